"""PSNR and MS-SSIM of 8-bit images, and their means."""

from __future__ import annotations

import math

import pytest
import torch
from pytorch_msssim import ms_ssim

from hpcm_scale.data.sources import ImageSet
from hpcm_scale.evaluation.bd_rate import decibels
from hpcm_scale.evaluation.measures import Estimated, mean, measure, peak_signal_to_noise


def test_psnr_of_identical_images_is_finite():
    x = torch.zeros(3, 4, 5, dtype=torch.uint8)
    assert peak_signal_to_noise(x, x) == 10 * math.log10(255**2 * 60)
    assert peak_signal_to_noise(x, x + 255) == 0


def test_an_image_by_hand(image_folder):
    photo = ImageSet(image_folder, limit=1).load(0)[:, :256, :384]
    darker = (photo.int() - 10).clamp(min=0).to(torch.uint8)
    measured = measure("kodim01.png", photo, darker, 4096.0, 0.5, 0.25)
    error = (photo.double() - darker.double()).square().mean().item()
    assert measured.psnr == pytest.approx(10 * math.log10(255**2 / error))
    expected = ms_ssim(photo[None].double(), darker[None].double(), data_range=255).item()
    assert measured.ms_ssim == pytest.approx(expected) and 0.9 < expected < 1
    assert measured.ms_ssim_db == pytest.approx(-10 * math.log10(1 - expected))
    assert (measured.bits, measured.bpp) == (4096, 4096 / (384 * 256))
    assert (measured.width, measured.height, measured.encode_seconds, measured.decode_seconds) == (384, 256, 0.5, 0.25)


@pytest.mark.parametrize(("side", "defined"), [(160, False), (161, True)])
def test_ms_ssim_needs_its_five_scales(side, defined):
    x = torch.arange(3 * side * 300).reshape(3, side, 300).remainder(251).to(torch.uint8)
    measured = measure("a", x, x, 1.0)
    assert (measured.ms_ssim is not None) == (measured.ms_ssim_db is not None) == defined
    if defined:
        assert measured.ms_ssim == pytest.approx(1) and measured.ms_ssim_db <= 100
    assert decibels(0.0) == pytest.approx(100)


def test_means_count_images_not_pixels():
    small, large = torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(3, 400, 400, dtype=torch.uint8)
    images = [measure("small", small, small + 5, 8.0, 1.0, 2.0), measure("large", large, large + 50, 8.0, 3.0, 4.0)]
    means = mean(images)
    psnrs = [20 * math.log10(255 / 5), 20 * math.log10(255 / 50)]
    assert means["psnr"] == pytest.approx(sum(psnrs) / 2)
    assert means["bpp"] == pytest.approx((8 / 4 + 8 / 160_000) / 2)
    assert (means["encode_seconds"], means["decode_seconds"]) == (2, 3)
    assert means["ms_ssim"] is None and means["ms_ssim_db"] is None  # the small one has none


def test_similarity_in_decibels_is_that_of_the_mean(image_folder):
    """As in published curves; the mean of the decibels is another number."""
    photo = ImageSet(image_folder).load(4)[:, :256, :384]
    images = [measure(str(step), photo, photo // step * step, 8) for step in (8, 64)]
    means = mean(images)
    assert means["ms_ssim_db"] == decibels(1 - (images[0].ms_ssim + images[1].ms_ssim) / 2)
    assert means["ms_ssim_db"] < sum(image.ms_ssim_db for image in images) / 2 - 1


def test_means_of_estimates_hold_the_loss():
    x = torch.zeros(3, 4, 4, dtype=torch.uint8)
    plain = vars(measure("a", x, x, 8.0))
    images = [Estimated(**plain, loss=loss, bpp_y=0.25, bpp_z=0.25, mse=0.5) for loss in (1.0, 2.0)]
    means = mean(images)
    assert (means["loss"], means["bpp_y"], means["mse"], means["encode_seconds"]) == (1.5, 0.25, 0.5, None)
