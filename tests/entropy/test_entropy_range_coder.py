"""Symbols to bytes and back: nothing lost, nothing clipped, no more bytes than they are worth."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcm_scale.entropy.range_coder import LARGEST_SYMBOL, CorruptStream, SymbolReader, SymbolWriter, frequencies

STREAM_DIGEST = "716044b6c60aa1aef9022191acecaa9d3d7d91695878d81d14a718db2b86b9e7"

symbols_and_tables = st.lists(
    st.tuples(
        st.one_of(st.integers(-3, 3), st.integers(-700, 700), st.integers(-LARGEST_SYMBOL, LARGEST_SYMBOL)),
        st.integers(0, 59),
    ),
    min_size=1,
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(symbols_and_tables, min_size=1, max_size=4))
def test_every_symbol_comes_back(parts):
    writer = SymbolWriter()
    arrays = [tuple(np.array(column) for column in zip(*part, strict=True)) for part in parts]
    for symbols, tables in arrays:
        writer.write(symbols.astype(np.int32), tables)
    reader = SymbolReader(writer.bytes)
    for symbols, tables in arrays:
        read = reader.read(tables)
        assert read.dtype == np.int32
        assert (read == symbols).all()


@pytest.mark.parametrize("table", [0, 13, 30, 59])
def test_thirty_thousand_survives_in_every_table(table):
    widest = len(frequencies(table)) // 2 - 1
    symbols = np.array([30_000, -30_000, 0, widest, widest + 1, -widest - 1, LARGEST_SYMBOL], dtype=np.int32)
    writer = SymbolWriter()
    writer.write(symbols, np.full(len(symbols), table))
    assert (SymbolReader(writer.bytes).read(np.full(len(symbols), table)) == symbols).all()


@pytest.mark.parametrize("table", [0, 10, 25, 45, 59])
def test_size_is_the_entropy(table):
    """100,000 symbols drawn from the table itself cost its entropy: within 0.1 % and four words."""
    share = np.array(frequencies(table)) / 2**24
    widest = len(share) // 2 - 1
    generator = np.random.default_rng(0)
    entries = generator.choice(len(share) - 1, size=100_000, p=share[:-1] / share[:-1].sum())
    writer = SymbolWriter()
    writer.write((entries - widest).astype(np.int32), np.full(len(entries), table))
    worth = -np.log2(share[entries]).sum()
    assert worth <= 8 * len(writer.bytes) <= 1.001 * worth + 128


def test_choices_come_back():
    probabilities = (0.5, 0.25, 0.125, 0.125)
    chosen = np.random.default_rng(1).choice(4, size=1000, p=probabilities)
    writer = SymbolWriter()
    writer.write_choices(chosen, probabilities)
    assert (SymbolReader(writer.bytes).read_choices(1000, probabilities) == chosen).all()


def test_nothing_is_no_bytes():
    assert SymbolWriter().bytes == b""


def test_half_a_word_is_corrupt():
    with pytest.raises(CorruptStream):
        SymbolReader(b"abc")


def test_the_bytes_never_change():
    """They are part of the file format, the range coder of another library included."""
    tables = np.arange(6000) % 60
    symbols = ((np.arange(6000) * 7919) % 13 - 6) * (tables > 20)
    symbols[::500] = 30_000 * (-1) ** np.arange(12)
    writer = SymbolWriter()
    writer.write(symbols.astype(np.int32), tables)
    writer.write_choices(np.arange(100) % 7, [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert hashlib.sha256(writer.bytes).hexdigest() == STREAM_DIGEST
