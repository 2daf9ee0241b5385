"""What is measured of one coded image, the same for every codec."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from torch import Tensor

from hpcm_scale.coding.distortion import peak_signal_to_noise
from hpcm_scale.objective.ms_ssim import multi_scale_similarity, too_small


@dataclass(frozen=True)
class Measured:
    """One image through one codec; distortions are those of 8-bit RGB pixels."""

    name: str
    width: int
    height: int
    bits: float
    """Of the whole file, its header included; or the estimate."""
    bpp: float
    psnr: float
    """dB."""
    ms_ssim: float | None
    """None where the image is too small for it."""
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
) -> Measured:
    """Compare two images, both uint8 (3, H, W); `bits` is what `decoded` was coded with."""
    height, width = original.shape[1:]
    similarity = _similarity(original, decoded)
    return Measured(
        name=name,
        width=width,
        height=height,
        bits=bits,
        bpp=bits / (width * height),
        psnr=peak_signal_to_noise(original, decoded),
        ms_ssim=similarity,
        ms_ssim_db=None if similarity is None else decibels(similarity),
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


def decibels(similarity: float) -> float:
    """MS-SSIM as the field plots it: −10·log10(1 − MS-SSIM), at most 100 dB."""
    return -10 * math.log10(max(1 - similarity, 1e-10))


def _similarity(x: Tensor, y: Tensor) -> float | None:
    """MS-SSIM of two uint8 images (3, H, W), in float64; None where they are too small for it."""
    if too_small(x):
        return None
    # Channel by channel: the mean of the same three values, in a third of the memory.
    pairs = zip(x[:, None, None].double(), y[:, None, None].double(), strict=True)
    return math.fsum(multi_scale_similarity(one, other, data_range=255).item() for one, other in pairs) / len(x)
