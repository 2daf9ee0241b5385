"""Damaged and forged files: a clear error or the right picture, soon, and in little memory."""

from __future__ import annotations

import copy
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import file_mutations as mutations
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcm_scale.coding.codec import Codec, _checksum
from hpcm_scale.coding.container import MOST_PIXELS, Container, pack, unpack
from hpcm_scale.entropy.range_coder import (
    LARGEST_SYMBOL,
    CorruptStream,
    SymbolReader,
    SymbolWriter,
    frequencies,
    least_bits,
)
from hpcm_scale.entropy.shifts import ShiftReader, Shifts, shifted_tables, write_head, write_step
from hpcm_scale.errors import UserError

OUTCOMES = ("refused", "right picture", "the same, cut otherwise")
OTHERS = ("other_digest", "other_level")


@pytest.fixture(scope="module", params=[1, pytest.param(10, marks=pytest.mark.long)])
def thousands(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def outcomes(photo, thousands) -> mutations.Outcomes:
    images = [photo[:, 100:230, 200:400].contiguous(), photo[:, :90, :300].contiguous()]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # whose peak of memory is its own
        return pool.submit(mutations.run, images, 0, thousands).result()


@pytest.mark.launch
def test_thousands_of_mutations(outcomes, thousands):
    print(f"\n{'mutation':24}{'refused':>9}{'right picture':>15}{'cut otherwise':>15}")
    for mutation in mutations.SHALLOW | mutations.DEEP:
        row = [outcomes.counts[mutation.__name__, outcome] for outcome in OUTCOMES]
        print(f"{mutation.__name__:24}{row[0]:9}{row[1]:15}{row[2]:15}")
    total = [sum(n for (_, o), n in outcomes.counts.items() if o == outcome) for outcome in OUTCOMES]
    print(f"{'in all':24}{total[0]:9}{total[1]:15}{total[2]:15}")
    print(
        f"slowest {outcomes.slowest:.2f} s, honest {outcomes.honest_slowest:.2f} s; "
        f"memory beyond the start: honest {outcomes.honest_bytes / 1e6:.1f} MB, "
        f"hostile {outcomes.hostile_bytes / 1e6:.1f} MB"
    )
    assert outcomes.wrong == []
    assert sum(total) == thousands * sum((mutations.SHALLOW | mutations.DEEP).values()) == thousands * 1000
    assert sum(mutations.DEEP.values()) >= 100
    assert outcomes.slowest < 10 * outcomes.honest_slowest
    assert outcomes.hostile_bytes <= 2 * outcomes.honest_bytes


@pytest.mark.launch
def test_what_is_damaged_is_refused_and_what_is_whole_is_not(outcomes, thousands):
    """The other way round: where the picture cannot be right, none is given; where it is, it is."""
    by_kind = {kind: Counter() for kind, _ in outcomes.counts}
    for (kind, outcome), count in outcomes.counts.items():
        by_kind[kind][outcome] = count
    for kind in ("truncated", "extended", "swapped_headers", "swapped_streams", "huge_symbols", *OTHERS):
        assert set(by_kind[kind]) == {"refused"}, kind
    assert set(by_kind["stream_extended"]) == {"right picture"}
    assert by_kind["other_size"]["refused"] > thousands * mutations.DEEP[mutations.other_size] / 2
    if thousands == 10:
        assert by_kind["other_size"]["the same, cut otherwise"] > 0


def test_another_size_that_is_padded_alike_gives_the_picture_cut_otherwise(codec, photo):
    data = codec.compress(photo[:, :130, :200])
    content = unpack(data)
    picture = codec.decompress(pack(replace(content, width=198, height=131)))
    assert picture.shape == (3, 131, 198)
    assert torch.equal(picture[:, :130], codec.decompress(data)[:, :, :198])


@pytest.mark.parametrize(
    ("change", "code", "detail"),
    [
        ({"width": 2**14, "height": 2**14}, "stream-too-short", "16384×16384"),
        ({"width": 2**28, "height": 1}, "image-too-large", f"268435456×1 exceeds the {MOST_PIXELS:,} pixels"),
        ({"y": b""}, "wrong-symbols", ""),
        ({"y": b"abc"}, "wrong-symbols", ""),
        ({"y": b"", "symbols_checksum": 0}, "wrong-symbols", ""),
        ({"z": b""}, "stream-too-short", "200×130"),
        ({"symbols_checksum": 0}, "wrong-symbols", ""),
    ],
)
def test_refusals_name_the_mistake(codec, photo, change, code, detail):
    content = unpack(codec.compress(photo[:, :130, :200]))
    with pytest.raises(UserError) as refusal:
        codec.decompress(pack(replace(content, **change)))
    assert refusal.value.code == code and detail in str(refusal.value)


def test_wrong_weights_are_named(model, other_model, photo):
    codec, other = Codec(model), Codec(other_model)
    with pytest.raises(UserError) as refusal:
        other.decompress(codec.compress(photo[:, :20, :30]))
    assert refusal.value.code == "other-weights"
    assert codec.digest.hex() in str(refusal.value) and other.digest.hex() in str(refusal.value)
    assert codec.digest != other.digest


@torch.inference_mode()
def forged(codec: Codec, z: int, y: int) -> bytes:
    """A file of 256×256 pixels with all checksums right: z and y's symbols are ±z and ±y, whatever that leads to."""
    model, random = codec.model, np.random.default_rng(0)
    shape = model.latent_shapes(256, 256)[1]
    z_symbols = random.choice([-z, z], np.prod(shape)).astype(np.int32)
    z_writer, y_writer = SymbolWriter(), SymbolWriter()
    z_writer.write(z_symbols, codec._z_tables((1, *shape)))
    shifts = Shifts(23, 0, [np.zeros(1, np.int64)] * 11)
    write_head(y_writer, shifts)
    read = [z_symbols]

    def code(step: int, scales: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        symbols = random.choice([-y, y], scales.numel()).astype(np.int32)
        write_step(y_writer, shifts, step)
        y_writer.write(symbols, shifted_tables(scales.flatten(), 23, shifts.choices[step]))
        read.append(symbols)
        return torch.from_numpy(symbols).to(means).reshape(means.shape) + means

    z_hat = torch.from_numpy(z_symbols).float().reshape(1, *shape) + model.hyper_prior.means
    model.context.traverse_packed(model.h_s(z_hat), code)
    return pack(Container(codec.digest, 256, 256, z_writer.bytes, y_writer.bytes, _checksum(*read)))


@pytest.mark.parametrize(
    ("z", "y"), [(1, 1), (LARGEST_SYMBOL, 0), (0, LARGEST_SYMBOL), (LARGEST_SYMBOL, LARGEST_SYMBOL)]
)
def test_a_forged_file_decodes_to_some_image(codec, z, y):
    picture = codec.decompress(forged(codec, z, y))
    assert picture.shape == (3, 256, 256) and picture.dtype == torch.uint8


def test_numbers_that_overflow_are_no_crash(model):
    """Weights with which a forged file drives the context to infinity and to what is no number."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.context.parameters():
            parameter.mul_(40)
    codec = Codec(model)
    data = forged(codec, LARGEST_SYMBOL, LARGEST_SYMBOL)
    assert not codec.decode(unpack(data)).isfinite().all()
    assert codec.decompress(data).shape == (3, 256, 256)
    with pytest.raises(UserError):
        codec.decompress(pack(replace(unpack(data), y=unpack(data).y[:2000])))


bad_streams = st.one_of(
    st.binary(max_size=400),
    st.lists(st.sampled_from([0, 1, 2**31, 2**32 - 1]), max_size=100).map(lambda n: np.array(n, "<u4").tobytes()),
)
table_numbers = st.lists(st.integers(0, 59), min_size=1, max_size=300).map(np.array)


@settings(max_examples=100, deadline=None)
@given(bad_streams, st.lists(table_numbers, min_size=1, max_size=5))
def test_a_reader_raises_nothing_but_corrupt_stream(data, groups):
    try:
        reader = SymbolReader(data)
        for tables in groups:
            symbols = reader.read(tables)
            assert symbols.shape == tables.shape and np.abs(symbols).max() < 2**24
    except CorruptStream:
        pass


@settings(max_examples=60, deadline=None)
@given(bad_streams, st.integers(1, 2000))
def test_shifts_of_garbage_are_tables_or_corrupt(data, count):
    scales = torch.logspace(-6, 6, count)
    scales[:: max(count // 3, 1)] = torch.nan
    try:
        tables = ShiftReader(SymbolReader(data)).tables(scales)
        assert tables.shape == (count,) and tables.min() >= 0 and tables.max() < 60
    except CorruptStream:
        pass


def test_no_stream_is_shorter_than_the_least():
    """The rule that refuses short streams meets the cheapest there are: only the likeliest symbols."""
    random = np.random.default_rng(0)
    for count in (1, 2, 10, 1000, 30_000):
        for table in range(60):
            frequency = np.array(frequencies(table))
            symbol = int(frequency.argmax()) - (len(frequency) // 2 - 1)
            tables = np.full(count, table)
            writer = SymbolWriter()
            writer.write(np.full(count, symbol), tables)
            assert least_bits(tables) <= 8 * len(writer.bytes) <= least_bits(tables) * 1.001 + 64 + 2e-5 * count
            assert (SymbolReader(writer.bytes).read(tables) == symbol).all()
    for _ in range(200):
        tables = random.integers(0, random.integers(1, 61), random.integers(1, 500))
        writer = SymbolWriter()
        writer.write(np.zeros(len(tables), int), tables)
        assert (SymbolReader(writer.bytes).read(tables) == 0).all()


def test_a_stream_is_not_read_for_ever():
    """The range coder would go on past the end; the reader stops at what the bytes can hold, at once."""
    reader = SymbolReader(bytes(100))
    with pytest.raises(CorruptStream, match="too short for so many symbols"):
        reader.read(np.full(2000, 30))
    reader = SymbolReader(bytes(100))
    with pytest.raises(CorruptStream, match="too short for so many symbols"):
        for _ in range(2000):
            reader.read(np.full(1, 30))
