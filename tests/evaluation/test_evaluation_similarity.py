"""MS-SSIM of evaluations is that of pytorch_msssim, to rounding."""

from __future__ import annotations

import pytest
import torch
from pytorch_msssim import ms_ssim
from torch import Tensor

from hpcm_scale.data.sources import ImageSet
from hpcm_scale.evaluation.measures import similarity


def expected(x: Tensor, y: Tensor, kind: torch.dtype = torch.float64) -> float:
    return ms_ssim(x[None].to(kind), y[None].to(kind), data_range=255).item()


@pytest.mark.parametrize("cut", [0, 1, 330])
@pytest.mark.parametrize("step", [1, 4, 32, 128])
def test_it_is_that_of_the_library_in_float64(shared, cut, step):
    x = ImageSet(shared / "data" / "kodak", limit=1).load(0)[:, cut:, cut:]  # of odd sides, and of the least
    assert similarity(x, x // step * step) == pytest.approx(expected(x, x // step * step), abs=1e-13)


def test_images_that_differ_by_little_and_by_everything(shared):
    x = ImageSet(shared / "data" / "kodak", limit=1).load(0)
    y = x.clone()
    y[0, 100, 100] ^= 1
    assert 0 < 1 - similarity(x, y) < 1e-8
    assert similarity(x, y) == pytest.approx(expected(x, y), abs=1e-13)
    assert similarity(x, x) == pytest.approx(1, abs=1e-15)
    assert similarity(x, 255 - x) == pytest.approx(expected(x, 255 - x), abs=1e-13)  # contrast runs against it
    flat = torch.full_like(x, 7)
    assert similarity(flat, flat + 100) == pytest.approx(expected(flat, flat + 100), abs=1e-13)
