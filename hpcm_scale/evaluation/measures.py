"""What is measured of one coded image, the same for every codec."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcm_scale.coding.files import peak_signal_to_noise
from hpcm_scale.evaluation.bd_rate import METRICS
from hpcm_scale.objective import too_small

# MS-SSIM in float64, on a CPU at the speed of float32.


WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the scales, the finest first (Wang et al. 2003)."""
_LUMINANCE, _CONTRAST = (0.01 * 255) ** 2, (0.03 * 255) ** 2
"""Constants that keep quotients of flat regions finite."""


def _gaussian(size: int = 11, deviation: float = 1.5) -> list[float]:
    """The window, which pytorch_msssim works out in float32."""
    weights = torch.exp(-((torch.arange(size) - size // 2).float() ** 2) / (2 * deviation**2))
    return (weights / weights.sum()).double().tolist()


WINDOW = _gaussian()


def similarity(x: Tensor, y: Tensor) -> float:
    """MS-SSIM of two uint8 images (3, H, W) with sides from 161 pixels, the mean over the channels; 0 to 1.

    Equals pytorch_msssim in float64 but for rounding (1e-15), in 0.3 (one thread) to 0.6 (two) of its time, which is
    what pytorch_msssim takes in float32. That would be off, for variances are differences of large numbers: by up to
    0.003 dB on JPEGs of Kodak at qualities 5 to 95, and by 0.016 dB on images that differ by one level.
    """
    x, y = x.double(), y.double()
    product = torch.ones(len(x), dtype=torch.float64)
    for scale, weight in enumerate(WEIGHTS):
        if scale:
            odd = [side % 2 for side in x.shape[1:]]
            x, y = F.avg_pool2d(torch.stack([x, y]), 2, padding=odd)
        mean_x, mean_y = _blurred(x), _blurred(y)
        means, squares = mean_x * mean_y, mean_x**2 + mean_y**2
        # The two variances are only used as their sum, and blurred together.
        terms = (2 * (_blurred(x * y) - means) + _CONTRAST) / (_blurred(x * x + y * y) - squares + _CONTRAST)
        if scale == len(WEIGHTS) - 1:
            terms *= (2 * means + _LUMINANCE) / (squares + _LUMINANCE)
        product *= terms.mean(dim=(1, 2)).clamp(min=0) ** weight
    return product.mean().item()


def _blurred(image: Tensor) -> Tensor:
    """(C, H, W) under the window, where it lies inside: 10 pixels less a side; taps at equal distance are added first.

    On a CPU this takes less time than PyTorch's convolutions of float64.
    """
    middle = len(WINDOW) // 2
    for axis in (2, 1):
        size = image.shape[axis] - 2 * middle
        total = image.narrow(axis, middle, size) * WINDOW[middle]
        for near in range(middle):
            pair = image.narrow(axis, near, size) + image.narrow(axis, 2 * middle - near, size)
            total.add_(pair, alpha=WINDOW[near])
        image = total
    return image


@dataclass(frozen=True)
class Measured:
    """One image through one codec; distortions are those of 8-bit RGB pixels."""

    name: str
    width: int
    height: int
    bits: float
    """Of the whole file, its header included; or the estimate."""
    bpp: float
    psnr: float | None
    """dB; None where it was not asked for."""
    ms_ssim: float | None
    """None where it was not asked for, or the image is too small for it."""
    ms_ssim_db: float | None
    """−10·log10(1 − MS-SSIM)."""
    encode_seconds: float | None
    decode_seconds: float | None


@dataclass(frozen=True)
class Estimated(Measured):
    """One image whose bits were estimated: also the training loss and its parts, on unrounded pixels."""

    loss: float | None
    """That of the training, the reconstruction neither clamped nor rounded; None without a λ, or where the image is too
    small for MS-SSIM and the training was for that."""
    bpp_y: float
    bpp_z: float
    mse: float
    """For values in [0, 1]."""


def measure(
    name: str,
    original: Tensor,
    decoded: Tensor,
    bits: float,
    encode_seconds: float | None = None,
    decode_seconds: float | None = None,
    metrics: Collection[str] = tuple(METRICS),
) -> Measured:
    """Compare two images, both uint8 (3, H, W), by `metrics`; `bits` is what `decoded` was coded with."""
    height, width = original.shape[1:]
    compared = "ms-ssim" in metrics and not too_small(original)
    ms_ssim = similarity(original, decoded) if compared else None
    return Measured(
        name=name,
        width=width,
        height=height,
        bits=bits,
        bpp=bits / (width * height),
        psnr=peak_signal_to_noise(original, decoded) if "psnr" in metrics else None,
        ms_ssim=ms_ssim,
        ms_ssim_db=None if ms_ssim is None else decibels(ms_ssim),
        encode_seconds=encode_seconds,
        decode_seconds=decode_seconds,
    )


def mean(images: list[Measured]) -> dict[str, float | None]:
    """Means over the images of each measure: the field's habit, so the PSNR is the mean of the images' PSNRs.

    MS-SSIM in dB is that of the mean MS-SSIM, again as published curves have it. None where an image lacks the
    measure.
    """
    rows = [asdict(image) for image in images]
    keys = [key for key in rows[0] if key not in ("name", "width", "height")]
    columns = {key: [row[key] for row in rows] for key in keys}
    means = {key: None if None in values else math.fsum(values) / len(values) for key, values in columns.items()}
    if means["ms_ssim"] is not None:
        means["ms_ssim_db"] = decibels(means["ms_ssim"])
    return means


def decibels(ms_ssim: float) -> float:
    """MS-SSIM as the field plots it: −10·log10(1 − MS-SSIM), at most 100 dB."""
    return -10 * math.log10(max(1 - ms_ssim, 1e-10))
