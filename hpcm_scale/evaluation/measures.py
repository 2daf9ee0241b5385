"""Measurements of one decoded image, the same for every codec."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from pytorch_msssim import ms_ssim
from torch import Tensor

from hpcm_scale.coding.files import peak_signal_to_noise
from hpcm_scale.evaluation.bd_rate import METRICS, decibels
from hpcm_scale.objective import too_small


def similarity(x: Tensor, y: Tensor) -> float:
    """MS-SSIM (Wang et al. 2003) of two uint8 images (3, H, W) with sides from 161 pixels, the mean over channels.

    In float64: in float32, variances lose precision, and MS-SSIM is off by up to 0.003 dB on JPEGs of Kodak at
    qualities 5 to 95, and by 0.016 dB on images that differ by one level.
    """
    return ms_ssim(x[None].double(), y[None].double(), data_range=255).item()


@dataclass(frozen=True)
class Measured:
    """One image coded by one codec; distortions are on 8-bit RGB pixels."""

    name: str
    width: int
    height: int
    bits: float
    """Of the file, header included; or estimated."""
    bpp: float
    psnr: float | None
    """dB; None if not measured."""
    ms_ssim: float | None
    """None if not measured, or if the image is too small."""
    ms_ssim_db: float | None
    """−10·log10(1 − MS-SSIM)."""
    encode_seconds: float | None
    decode_seconds: float | None


@dataclass(frozen=True)
class Estimated(Measured):
    """One image with estimated bits; also has the training loss and its parts, on unrounded pixels."""

    loss: float | None
    """None without a λ, and if the training is for MS-SSIM and the image is too small for it."""
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
    """Compare an image with the decoded one, both uint8 (3, H, W), by `metrics`; `bits`: size of the file."""
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
        ms_ssim_db=None if ms_ssim is None else decibels(1 - ms_ssim),
        encode_seconds=encode_seconds,
        decode_seconds=decode_seconds,
    )


def mean(images: list[Measured]) -> dict[str, Any]:
    """Means over the images of each measurement, as floats; None if an image lacks it.

    The PSNR is the mean of the images' PSNRs, and MS-SSIM in dB is that of the mean MS-SSIM, as in published curves.
    """
    rows = [asdict(image) for image in images]
    keys = [key for key in rows[0] if key not in ("name", "width", "height")]
    columns = {key: [row[key] for row in rows] for key in keys}
    means = {key: None if None in values else math.fsum(values) / len(values) for key, values in columns.items()}
    if means["ms_ssim"] is not None:
        means["ms_ssim_db"] = decibels(1 - means["ms_ssim"])
    return means
