"""How far a decoded image is off."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def peak_signal_to_noise(x: Tensor, y: Tensor) -> float:
    """PSNR in dB of two uint8 images; that of one wrong level in one value for identical ones."""
    errors = (x.to(torch.int32) - y.to(torch.int32)).square().sum(dtype=torch.int64).item()
    return 10 * math.log10(255**2 * x.numel() / max(errors, 1))
