"""Encode, decode, estimate: one traversal, the same latents to the bit, and files as small as was estimated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcm_scale.coding.codec import Codec
from hpcm_scale.coding.container import unpack
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.entropy.range_coder import SymbolWriter
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.estimate import pad
from hpcm_scale.model.hpcm import HPCM


@pytest.fixture(scope="module")
def codec(model: HPCM) -> Codec:
    return Codec(model)


@pytest.fixture(scope="module")
def kodak(image_folder) -> ImageSet:
    return ImageSet(image_folder)


def estimated(model: HPCM, pixels: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Bits, ŷ and 8-bit picture of a forward pass, as training and evaluation do it."""
    seen = []
    handle = model.g_s.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        x = pad(pixels[None].float() / 255, model.multiple)
        coded = model(x.contiguous(memory_format=torch.channels_last))
    handle.remove()
    x_hat = coded.x_hat[0, :, : pixels.shape[1], : pixels.shape[2]]
    picture = (x_hat.clamp(0, 1) * 255).round().to(torch.uint8)
    return (coded.bits_y + coded.bits_z).item(), seen[0], picture


def check(codec: Codec, pixels: torch.Tensor) -> bytes:
    """Training's, encoder's and decoder's ŷ are equal to the bit, and so are the pictures."""
    _, y_hat, picture = estimated(codec.model, pixels)
    encoded = codec.encode(pixels)
    decoded = codec.decode(unpack(encoded.data))
    assert torch.equal(encoded.y_hat, y_hat)
    assert torch.equal(decoded, y_hat)
    found = codec.decompress(encoded.data)
    assert found.shape == pixels.shape and found.dtype == torch.uint8
    assert torch.equal(found, picture)
    assert codec.compress(pixels) == encoded.data
    return encoded.data


@pytest.mark.launch
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["noise", "flat", "photo"]), st.integers(0, 2**31))
def test_every_size_comes_back(codec, kodak_photo, height, width, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        pixels = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
    elif kind == "flat":
        pixels = torch.randint(256, (3, 1, 1), generator=generator, dtype=torch.uint8).expand(3, height, width)
    else:
        pixels = kodak_photo[:, :height, :width]
    check(codec, pixels)


@pytest.fixture(scope="module")
def kodak_photo(kodak) -> torch.Tensor:
    return kodak.load(4)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (256, 256), (257, 255)])
def test_corner_sizes_come_back(codec, kodak_photo, size):
    check(codec, kodak_photo[:, : size[0], : size[1]])


@pytest.mark.launch
def test_files_are_as_small_as_was_estimated(trained_model, kodak):
    """Within 0.5 % and 64 bytes on every image tried, with weights that have learned to estimate."""
    codec = Codec(trained_model)
    for i in range(0, len(kodak), 8):
        pixels = kodak.load(i)
        bits, _, _ = estimated(trained_model, pixels)
        assert 8 * len(codec.compress(pixels)) == pytest.approx(bits, rel=0.005, abs=64 * 8), kodak.names[i]


@pytest.mark.parametrize("symbol", [30_000, -30_000])
def test_symbols_beyond_every_table_survive(codec, kodak_photo, monkeypatch, symbol):
    """y is pushed far out at a few places, as a photo like no other in training would."""
    analyse = Codec._analyse

    def extreme(self: Codec, pixels: torch.Tensor) -> torch.Tensor:
        y = analyse(self, pixels)
        y[0, ::5, ::3, ::4] += symbol
        return y

    monkeypatch.setattr(Codec, "_analyse", extreme)
    encoded = codec.encode(kodak_photo)
    assert encoded.y_hat.abs().max() > 25_000
    assert torch.equal(codec.decode(unpack(encoded.data)), encoded.y_hat)


def old_setting() -> None:
    torch.set_float32_matmul_precision("medium")


def new_setting() -> None:
    torch.backends.fp32_precision = "tf32"


@pytest.mark.parametrize("reduce", [old_setting, new_setting])
def test_settings_of_training_do_not_reach_the_codec(codec, kodak_photo, reduce):
    """Reduced precision of the caller's is left aside, and given back."""
    places = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before, old = [place.fp32_precision for place in places], torch.get_float32_matmul_precision()
    expected = codec.compress(kodak_photo)
    picture = codec.decompress(expected)
    try:
        reduce()
        reduced = [place.fp32_precision for place in places]
        with torch.autocast("cpu", torch.bfloat16):
            assert codec.compress(kodak_photo) == expected
            assert torch.equal(codec.decompress(expected), picture)
        assert [place.fp32_precision for place in places] == reduced
    finally:
        torch.set_float32_matmul_precision(old)
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def test_broken_weights_are_refused(model, kodak_photo):
    codec = Codec(model)
    for broken in (torch.nan, 1e12):
        weight = model.g_a[0].bias
        before = weight.detach().clone()
        with torch.no_grad():
            weight[0] = broken
        try:
            with pytest.raises(UserError) as refusal:
                codec.compress(kodak_photo)
            assert refusal.value.code == "latents-out-of-range"
        finally:
            with torch.no_grad():
                weight.copy_(before)


def test_symbols_are_coded_once_each(codec, kodak_photo, monkeypatch):
    """The streams hold z and y wholly, padded to the model's sides, and no symbol twice."""
    counts = []
    write = SymbolWriter.write

    def counting(self, symbols: np.ndarray, tables: np.ndarray) -> None:
        counts.append(len(symbols))
        write(self, symbols, tables)

    monkeypatch.setattr(SymbolWriter, "write", counting)
    codec.compress(kodak_photo)
    config = codec.model.config
    height, width = (side + -side % codec.model.multiple for side in kodak_photo.shape[1:])
    assert counts[0] == config.hyper_latent_channels * height * width // 64**2
    assert len(counts) == 12 and sum(counts[1:]) == config.latent_channels * height * width // 16**2
