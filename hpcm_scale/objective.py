"""Distortions and the rate-distortion loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pytorch_msssim.ssim import _fspecial_gauss_1d, _ssim
from torch import Tensor

from hpcm_scale.config.checks import MS_SSIM_SMALLEST_SIDE
from hpcm_scale.config.schema import Distortion

# The rate-distortion loss of a batch, image by image.


class RateDistortion(NamedTuple):
    """What a batch of reconstructions costs and how far it is off; fp32, (B,) or, after `mean`, ()."""

    loss: Tensor
    """λ·255²·MSE + bpp; carries the gradient."""
    bpp: Tensor
    """Bits per image pixel: bpp_y + bpp_z."""
    bpp_y: Tensor
    bpp_z: Tensor
    mse: Tensor
    """Mean squared error over channels and pixels, for values in [0, 1]."""
    psnr: Tensor
    """−10·log10(MSE) in dB, without gradient; infinite for an exact reconstruction."""

    def mean(self) -> RateDistortion:
        """Each quantity averaged over the images; the PSNR is the mean of the images' PSNRs."""
        return RateDistortion(*(quantity.mean() for quantity in self))


def rate_distortion_loss(
    x: Tensor, x_hat: Tensor, bits_y: Tensor, bits_z: Tensor, lmbda: float | Tensor
) -> RateDistortion:
    """λ·255²·MSE(x, x̂) + bits per pixel of each image (the papers' objective; λ on the scale of 8-bit MSE).

    All is worked out in fp32, under autocast too. The images of a batch have one size, so the mean loss is
    also the loss of the batch taken as a whole.

    Args:
        x: images (B, 3, H, W) in [0, 1]. Padding must be cropped off both x and x_hat: pixels are
            counted here.
        x_hat: reconstructions, same shape, neither clamped nor rounded here.
        bits_y: bits of the latent of each image, (B,).
        bits_z: bits of the hyper-latent of each image, (B,).
        lmbda: λ, the price of distortion; one for all images, or (B,).

    Raises:
        ValueError: shapes that do not belong together.
    """
    if x.dim() != 4 or x_hat.shape != x.shape:
        raise ValueError(f"images {tuple(x.shape)} and reconstructions {tuple(x_hat.shape)} differ in shape")
    if bits_y.shape != x.shape[:1] or bits_z.shape != x.shape[:1]:
        shapes = tuple(bits_y.shape), tuple(bits_z.shape)
        raise ValueError(f"bits come per image, ({len(x)},), not in shapes {shapes[0]} and {shapes[1]}")
    pixels = x.shape[2] * x.shape[3]
    bpp_y, bpp_z = bits_y.float() / pixels, bits_z.float() / pixels
    bpp = bpp_y + bpp_z
    mse = (x.float() - x_hat.float()).square().mean(dim=(1, 2, 3))
    psnr = -10 * torch.log10(mse.detach())
    return RateDistortion(lmbda * 255**2 * mse + bpp, bpp, bpp_y, bpp_z, mse, psnr)


class RateDistortionObjective:
    """`rate_distortion_loss` as training and evaluation call every objective; others have another `loss`."""

    fields = RateDistortion._fields
    loss = staticmethod(rate_distortion_loss)

    def __init__(self, lmbda: float | Callable[[Tensor], Tensor]) -> None:
        """`lmbda`: λ, or with variable rate what gives it, (B,), for levels (B,)."""
        self._lmbda = lmbda

    def __call__(self, x: Tensor, coded: Any, level: Tensor | None = None) -> RateDistortion:
        """Images (B, 3, H, W), what a codec made of them (its `x_hat`, `bits_y`, `bits_z`), and their levels."""
        lmbda = self._lmbda(level) if callable(self._lmbda) else self._lmbda
        return self.loss(x, coded.x_hat, coded.bits_y, coded.bits_z, lmbda)


# The rate-distortion loss of a batch with MS-SSIM as its distortion, image by image.


_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the scales, fine to coarse."""
_WINDOW, _SIGMA = 11, 1.5
"""Of the Gaussian, in pixels."""


class SimilarityRateDistortion(NamedTuple):
    """What a batch of reconstructions costs and how far it is off; fp32, (B,) or, after `mean`, ()."""

    loss: Tensor
    """λ·(1 − MS-SSIM) + bpp; carries the gradient."""
    bpp: Tensor
    """Bits per image pixel: bpp_y + bpp_z."""
    bpp_y: Tensor
    bpp_z: Tensor
    mse: Tensor
    """Mean squared error over channels and pixels, for values in [0, 1]."""
    psnr: Tensor
    """−10·log10(MSE) in dB, without gradient; infinite for an exact reconstruction."""
    ms_ssim: Tensor
    """0 to 1, the mean over the channels."""

    def mean(self) -> SimilarityRateDistortion:
        """Each quantity averaged over the images; the PSNR is the mean of the images' PSNRs."""
        return SimilarityRateDistortion(*(quantity.mean() for quantity in self))


def similarity_loss(
    x: Tensor, x_hat: Tensor, bits_y: Tensor, bits_z: Tensor, lmbda: float | Tensor
) -> SimilarityRateDistortion:
    """λ·(1 − MS-SSIM(x, x̂)) + bits per pixel of each image, after CompressAI (arXiv 2011.03029).

    Arguments as of `rate_distortion_loss`; Raises ValueError as it does, and for images that are `too_small`.
    """
    plain = rate_distortion_loss(x, x_hat, bits_y, bits_z, 0.0)
    similarity = multi_scale_similarity(x.float(), x_hat.float())
    return SimilarityRateDistortion(lmbda * (1 - similarity) + plain.bpp, *plain[1:], similarity)


class SimilarityObjective(RateDistortionObjective):
    """The same for `similarity_loss`."""

    fields = SimilarityRateDistortion._fields
    loss = staticmethod(similarity_loss)


def too_small(image: Tensor) -> bool:
    """Whether MS-SSIM is not defined for an image (…, H, W): for a side below `MS_SSIM_SMALLEST_SIDE`."""
    return min(image.shape[-2:]) < MS_SSIM_SMALLEST_SIDE


def multi_scale_similarity(x: Tensor, y: Tensor) -> Tensor:
    """MS-SSIM (Wang et al. 2003) of images (B, C, H, W) of one float type in [0, 1], the mean over channels; (B,).

    Worked out in the type of the images, under autocast too. Where the contrast of a channel runs against the
    original's on some scale, its MS-SSIM is 0, and so is the gradient. Raises ValueError for `too_small` images.
    """
    if too_small(x):
        raise ValueError(f"MS-SSIM needs sides from {MS_SSIM_SMALLEST_SIDE} pixels, not {tuple(x.shape)}")
    kind = x.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        # Not channels-last, for which a GPU would multiply TF32 numbers where the rest of the process does.
        return _multi_scale_similarity(x.contiguous(), y.contiguous())


def _multi_scale_similarity(x: Tensor, y: Tensor) -> Tensor:
    """`pytorch_msssim.ms_ssim`, whose six constants from host memory would each make the host wait for the GPU."""
    with torch.device(x.device):
        window = _fspecial_gauss_1d(_WINDOW, _SIGMA).repeat(x.shape[1], 1, 1, 1)
    factors = []
    for scale in range(len(_WEIGHTS)):
        if scale:
            padding = [side % 2 for side in x.shape[2:]]
            x, y = (F.avg_pool2d(image, 2, padding=padding) for image in (x, y))
        similarity, contrast = _ssim(x, y, data_range=1.0, win=window)
        factors.append(contrast)
    factors[-1] = similarity
    weighted = [factor.relu() ** weight for factor, weight in zip(factors, _WEIGHTS, strict=True)]
    return torch.stack(weighted).prod(dim=0).mean(dim=1)


# Which rate-distortion loss goes with a distortion.


def objective_of(distortion: Distortion, lmbda: float | Callable[[Tensor], Tensor]) -> RateDistortionObjective:
    """What is trained for; `lmbda`: λ, or with variable rate what gives it, (B,), for levels (B,)."""
    kinds = {Distortion.mse: RateDistortionObjective, Distortion.ms_ssim: SimilarityObjective}
    return kinds[distortion](lmbda)
