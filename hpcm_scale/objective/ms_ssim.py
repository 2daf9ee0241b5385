"""The rate-distortion loss of a batch with MS-SSIM as its distortion, image by image."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pytorch_msssim.ssim import _fspecial_gauss_1d, _ssim
from torch import Tensor

from hpcm_scale.config.distortions import MS_SSIM_SMALLEST_SIDE
from hpcm_scale.objective.rate_distortion import RateDistortionObjective, rate_distortion_loss

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
