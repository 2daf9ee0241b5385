"""One model, many rates: every level comes back to the bit, and searches find the file that was asked for."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from portable_decoding import decodes, noise, variant
from seeded_models import spread_nano
from torch import Tensor

from hpcm_scale.coding.codec import Codec
from hpcm_scale.coding.container import pack, unpack
from hpcm_scale.coding.files import at_level, nearest_to_rate, peak_signal_to_noise, smallest_with_psnr
from hpcm_scale.config.compose import compose_model
from hpcm_scale.config.schema import RateConfig
from hpcm_scale.entropy.shifts import Tolerance
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.estimate import pad
from hpcm_scale.model.hpcm import HPCM, Noise
from hpcm_scale.model.variable_rate import byte_of_quality, default_byte, level_of_byte, lmbda_of, quality_of_byte
from hpcm_scale.objective import rate_distortion_loss

LEVELS = 5


@pytest.fixture(scope="module")
def variable() -> Codec:
    return Codec(spread_nano(3, LEVELS))


@pytest.fixture(scope="module")
def learned(photo) -> Codec:
    """A nano after a second or two of learning over a wide range of λ: its PSNR, too, rises with the level."""
    torch.manual_seed(0)
    model = HPCM(replace(compose_model("nano"), rate=RateConfig(levels=LEVELS, lowest=1e-4)))
    crop = photo[None, :, 100:356, 200:456].float() / 255
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(14):
        level = (LEVELS - 1) * torch.rand(1)
        coded = model(crop, Noise(*(torch.rand(1, *shape) - 0.5 for shape in model.latent_shapes(256, 256))), level)
        loss = rate_distortion_loss(crop, *coded, lmbda_of(model.config.rate, level)).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return Codec(model.eval())


def estimated(model: HPCM, pixels: Tensor, byte: int) -> tuple[Tensor, Tensor]:
    """ŷ and 8-bit picture of a forward pass, as training and evaluation do it."""
    seen = []
    handle = model.g_s.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        x = pad(pixels[None].float() / 255, model.multiple).contiguous(memory_format=torch.channels_last)
        coded = model(x, level=torch.tensor([level_of_byte(model.config.rate, byte)]))
    handle.remove()
    x_hat = coded.x_hat[0, :, : pixels.shape[1], : pixels.shape[2]]
    return seen[0], (x_hat.clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.mark.launch
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([0, 64, 255]) | st.integers(0, 255))
def test_every_level_comes_back(variable, photo, height, width, byte):
    """Estimate, encoder and decoder have the same ŷ to the bit, at levels between the tables' rows, too."""
    pixels = photo[:, :height, :width]
    y_hat, picture = estimated(variable.model, pixels, byte)
    encoded = variable.encode(pixels, byte)
    content = unpack(encoded.data)
    assert content.level == byte and encoded.data[4] == 2
    assert torch.equal(encoded.y_hat, y_hat) and torch.equal(variable.decode(content), y_hat)
    assert torch.equal(variable.decompress(encoded.data), picture)


def test_levels_of_an_image_do_not_disturb_each_other(variable, photo):
    pixels = photo[:, :150, :140]
    encode = variable.encoder(pixels)
    for byte in (200, 0, 200, 91):
        assert encode(byte).data == variable.compress(pixels, byte)


@pytest.mark.launch
def test_rate_rises_with_quality(learned, photo):
    encode = learned.encoder(photo)
    sizes = [len(encode(byte_of_quality(quality)).data) for quality in range(0, 101, 25)]
    assert sizes == sorted(sizes) and sizes[-1] > 1.3 * sizes[0]


@pytest.mark.launch
@pytest.mark.parametrize("part", [0.02, 0.9])
def test_a_rate_is_met_within_three_percent(learned, photo, part):
    area = photo[0].numel()
    lowest, highest = (8 * len(learned.compress(photo, byte)) / area for byte in (0, 255))
    target = lowest + part * (highest - lowest)
    data, level, _ = nearest_to_rate(learned, photo, target)
    assert data == learned.compress(photo, level)
    assert 8 * len(data) / area == pytest.approx(target, rel=0.03)


@pytest.mark.launch
def test_searches_find_the_best_of_all_files(learned, photo, monkeypatch):
    """Files of all rates, a level in twenty: none is nearer to a rate, none smaller with a PSNR."""
    pixels = photo[:, 100:200, 300:420]
    encode = cache(learned.encoder(pixels))
    monkeypatch.setattr(learned, "encoder", lambda _: encode)  # every search tries some of the same levels
    files = [encode(byte) for byte in [*range(0, 255, 20), 255]]
    rates = [8 * len(file.data) / pixels[0].numel() for file in files]
    psnrs = [peak_signal_to_noise(pixels, learned.reconstruct(file.y_hat, 100, 120)) for file in files]
    for target in (rates[0], rates[8], 0.7 * rates[0] + 0.3 * rates[-1]):
        data, _, _ = nearest_to_rate(learned, pixels, target)
        assert abs(8 * len(data) / pixels[0].numel() - target) <= min(abs(rate - target) for rate in rates)
    for target in (psnrs[0] - 5, 0.4 * psnrs[0] + 0.6 * psnrs[-1]):
        data, _, psnr = smallest_with_psnr(learned, pixels, target)
        assert psnr >= target
        enough = [rate for rate, psnr in zip(rates, psnrs, strict=True) if psnr >= target]
        assert 8 * len(data) / pixels[0].numel() <= min(enough)


@pytest.mark.launch
def test_the_psnr_is_that_of_the_decoded_image(learned, photo):
    pixels = photo[:, 100:300, 300:520]
    data, level, psnr = smallest_with_psnr(learned, pixels, 1.0)
    assert data == learned.compress(pixels, level) and len(data) <= len(learned.compress(pixels, 0))
    assert psnr == peak_signal_to_noise(pixels, learned.decompress(data))


@pytest.mark.launch
@pytest.mark.parametrize("search", [nearest_to_rate, smallest_with_psnr])
def test_a_target_out_of_range_is_refused_with_the_range(learned, photo, search):
    """Both ends of the range can be reached."""
    pixels = photo[:, 100:300, 300:520]
    with pytest.raises(UserError) as refusal:
        search(learned, pixels, 99)
    unit, name = ("bpp", "bpp") if search is nearest_to_rate else ("dB", "psnr")
    assert (refusal.value.code, refusal.value.key) == (f"{name}-out-of-range", f"--{name}")
    stated = re.fullmatch(rf"99 {unit} is out of .*; choose between ([\d.]+) and ([\d.]+) {unit}", str(refusal.value))
    low, high = map(float, stated.groups())
    assert len(search(learned, pixels, low).data) < len(search(learned, pixels, high).data)
    if search is nearest_to_rate:
        with pytest.raises(UserError, match=r"^1e-06 bpp is out of range"):
            search(learned, pixels, 1e-6)


def test_qualities_and_bytes():
    """Whole qualities are printed as given; every byte has a short quality that leads back to it."""
    assert [byte_of_quality(quality) for quality in (0, 20, 40, 60, 80, 100)] == [0, 51, 102, 153, 204, 255]
    assert [quality_of_byte(byte_of_quality(quality)) for quality in range(101)] == list(range(101))
    for byte in range(256):
        assert byte_of_quality(float(f"{quality_of_byte(byte):g}")) == byte
    rate = RateConfig(levels=3, lowest=0.01, highest=0.04, reference=0.02)
    assert default_byte(rate) == 128  # the middle of λ's logarithms
    assert default_byte(replace(rate, reference=5.0)) == 255


def test_levels_and_rates_that_do_not_belong_together(variable, codec, photo):
    """A quality for a model of one rate, none for one of many; files of the one for the other."""
    pixels = photo[:, :60, :70]
    for coder, level, code in ((codec, 128, "quality-at-fixed-rate"), (variable, None, "no-quality")):
        with pytest.raises(UserError) as refusal:
            coder.compress(pixels, level)
        assert (refusal.value.code, refusal.value.key) == (code, "--quality")
    fixed_file, variable_file = at_level(codec, pixels, None).data, at_level(variable, pixels, 9).data
    assert fixed_file[4] == 1 and codec.decompress(fixed_file).shape == pixels.shape
    for reader, data, rate in ((codec, variable_file, "variable"), (variable, fixed_file, "fixed")):
        with pytest.raises(UserError) as refusal:
            reader.decompress(data)
        assert refusal.value.code == "other-weights"
        forged = pack(replace(unpack(data), digest=reader.digest))
        with pytest.raises(UserError, match=f"{rate}-rate model") as refusal:
            reader.decompress(forged)
        assert refusal.value.code == "header-rate"


def test_another_arithmetic_decodes_the_highest_level(variable, photo):
    """Noise of 1e-6 on every layer, which gains make larger: so is the distance that the shifts keep."""
    other = variant(variable, noise)
    largest = variable.model.context.gains.log.max().exp().item()
    assert largest > 2
    pieces = [photo, photo.flip(1), photo.flip(2)]
    assert all(decodes(other, variable.compress(piece, 255)) for piece in pieces)
    fragile = Codec(variable.model, Tolerance(0, 0))
    assert not all(decodes(other, fragile.compress(piece, 255)) for piece in pieces)
