"""MS-SSIM of evaluations: float64, for images that differ by little and by everything."""

from __future__ import annotations

import pytest
import torch

from hpcm_scale.data.sources import ImageSet
from hpcm_scale.evaluation.measures import similarity


def test_images_that_differ_by_little_and_by_everything(image_folder):
    x = ImageSet(image_folder, limit=1).load(0)[:, :256, :384]
    y = x.clone()
    y[0, 100, 100] ^= 1
    assert 0 < 1 - similarity(x, y) < 1e-8  # float32 has no such number
    assert similarity(x, x) == pytest.approx(1, abs=1e-15)
    assert similarity(x, 255 - x) == 0  # its contrast is negative
    flat = torch.full_like(x, 7)
    luminance = (2 * 7 * 107 + 6.5025) / (7**2 + 107**2 + 6.5025)  # of the coarsest scale; other factors are 1
    assert similarity(flat, flat + 100) == pytest.approx(luminance**0.1333, rel=2e-5)  # float32 window


@pytest.mark.parametrize("cut", [0, 1, 39])
def test_any_size_from_161_pixels(shared, cut):
    x = ImageSet(shared / "data" / "kodak", limit=1).load(0)[:, cut:200, cut:220]
    scores = [similarity(x, x // step * step) for step in (1, 4, 32, 128)]
    assert scores[0] == pytest.approx(1) and scores == sorted(scores, reverse=True) and scores[-1] < 0.9
