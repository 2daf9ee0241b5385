"""What is measured of one coded image, the same for every codec."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass

from torch import Tensor

from hpcm_scale.coding.distortion import peak_signal_to_noise
from hpcm_scale.evaluation.bd_rate import METRICS
from hpcm_scale.evaluation.similarity import similarity
from hpcm_scale.objective.ms_ssim import too_small


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
