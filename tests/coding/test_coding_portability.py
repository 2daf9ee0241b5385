"""A file made on one device decodes on another: the same symbols, pixels within rounding."""

from __future__ import annotations

import numpy as np
import pytest
from portable_decoding import VARIANTS, decodes, gpu, noise, other_threads, variant
from torch import Tensor

from hpcm_scale.coding.codec import Codec
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.entropy.range_coder import SymbolReader
from hpcm_scale.entropy.shifts import Tolerance
from hpcm_scale.errors import UserError
from hpcm_scale.model.hpcm import HPCM


@pytest.fixture(scope="module")
def kodak(image_folder) -> list[Tensor]:
    images = ImageSet(image_folder)
    return [images.load(i) for i in range(4, len(images), 8)]  # the first needs shifts


@pytest.fixture(scope="module")
def codec(model: HPCM) -> Codec:
    return Codec(model)


@pytest.fixture(scope="module")
def files(codec: Codec, kodak: list[Tensor]) -> list[bytes]:
    return [codec.compress(pixels) for pixels in kodak]


@pytest.fixture(scope="module")
def pictures(codec: Codec, files: list[bytes]) -> list[Tensor]:
    return [codec.decompress(data) for data in files]


def assert_alike(found: Tensor, expected: Tensor) -> None:
    """Pixels of two devices differ by rounding, and seldom."""
    apart = (found.int() - expected.int()).abs()
    assert apart.max() <= 1
    assert (apart != 0).float().mean() < 1e-3


@pytest.mark.launch
@pytest.mark.parametrize("name", VARIANTS)
def test_another_arithmetic_decodes_kodak(codec, files, pictures, name):
    other = variant(codec, VARIANTS[name])
    for data, picture in zip(files, pictures, strict=True):
        assert_alike(other.decompress(data), picture)


def test_another_number_of_threads_decodes_kodak(codec, files, pictures):
    with other_threads():
        for data, picture in zip(files, pictures, strict=True):
            assert_alike(codec.decompress(data), picture)


@pytest.mark.gpu
def test_one_device_encodes_and_the_other_decodes(codec, files, pictures, kodak):
    other = variant(codec, gpu)
    for data, picture, pixels in zip(files, pictures, kodak, strict=True):
        assert_alike(other.decompress(data), picture)
        assert_alike(codec.decompress(other.compress(pixels)), picture)


def test_without_shifts_it_does_not_decode(model, kodak):
    """The twin of the first test that is seen to fail: this is what the shifts are for."""
    fragile = Codec(model, Tolerance(0, 0))
    other = variant(fragile, noise)
    assert sum(not decodes(other, fragile.compress(pixels)) for pixels in kodak) >= 1


@pytest.mark.launch
def test_shifts_cost_little(trained_model, kodak):
    """At most 0.3 % of the bits of the images; what they cost is what their absence saves."""
    codec = Codec(trained_model)
    cost = total = 0.0
    for pixels in kodak:
        encoded = codec.encode(pixels)
        cost += encoded.shift_bits
        total += 8 * len(encoded.data)
    assert 0 < cost <= 0.003 * total
    saved = 8 * (len(encoded.data) - len(Codec(codec.model, Tolerance(0, 0)).compress(kodak[-1])))
    assert saved == pytest.approx(encoded.shift_bits, abs=96)


@pytest.mark.parametrize("call", [0, 1, 11])
def test_a_wrong_symbol_is_an_error_not_an_image(codec, files, monkeypatch, call):
    """A decoder that reads one symbol otherwise, of z or of any step of y, says so."""
    read, calls = SymbolReader.read, []

    def astray(self: SymbolReader, tables: np.ndarray) -> np.ndarray:
        symbols = read(self, tables)
        if len(calls) == call:
            symbols[len(symbols) // 2] += 1
        calls.append(len(symbols))
        return symbols

    monkeypatch.setattr(SymbolReader, "read", astray)
    with pytest.raises(UserError) as refusal:
        codec.decompress(files[0])
    assert refusal.value.code == "wrong-symbols"
    assert len(calls) > call
