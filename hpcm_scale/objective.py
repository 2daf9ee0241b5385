"""Distortions and the rate-distortion loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from pytorch_msssim.ssim import _fspecial_gauss_1d, _ssim
from torch import Tensor

from hpcm_scale.config.checks import MS_SSIM_SMALLEST_SIDE
from hpcm_scale.config.schema import Distortion


class RateDistortion(NamedTuple):
    """Rate and distortion of each image of a batch; fp32 (B,), or () after `mean`."""

    loss: Tensor
    """λ·255²·MSE + bpp; has the gradient."""
    bpp: Tensor
    """Bits per image pixel: bpp_y + bpp_z."""
    bpp_y: Tensor
    bpp_z: Tensor
    mse: Tensor
    """Mean squared error over channels and pixels, for values in [0, 1]."""
    psnr: Tensor
    """−10·log10(MSE) in dB, without gradient; infinite for an exact reconstruction."""

    def mean(self) -> RateDistortion:
        """The mean of each quantity over the images."""
        return RateDistortion(*(quantity.mean() for quantity in self))


def rate_distortion_loss(
    x: Tensor, x_hat: Tensor, bits_y: Tensor, bits_z: Tensor, lmbda: float | Tensor
) -> RateDistortion:
    """λ·255²·MSE(x, x̂) + bpp_y + bpp_z of each image, the loss of arXiv 2507.19125; λ on the scale of 8-bit MSE.

    Computed in fp32, also under autocast.

    Args:
        x: images (B, 3, H, W) in [0, 1], without padding: bpp counts their pixels.
        x_hat: reconstructions of the same shape, neither clamped nor rounded.
        bits_y: bits of the latent of each image, (B,).
        bits_z: bits of the hyper-latent of each image, (B,).
        lmbda: λ, one for all images, or (B,).

    Raises:
        ValueError: mismatched shapes.
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


# MS-SSIM as distortion.

_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the scales, from fine to coarse."""
_WINDOW, _SIGMA = 11, 1.5
"""Side and σ of the Gaussian window, in pixels."""


class MsSsimRateDistortion(NamedTuple):
    """`RateDistortion` with MS-SSIM."""

    loss: Tensor
    """λ·(1 − MS-SSIM) + bpp; has the gradient."""
    bpp: Tensor
    bpp_y: Tensor
    bpp_z: Tensor
    mse: Tensor
    psnr: Tensor
    ms_ssim: Tensor
    """0 to 1, the mean over the channels."""

    def mean(self) -> MsSsimRateDistortion:
        """The mean of each quantity over the images."""
        return MsSsimRateDistortion(*(quantity.mean() for quantity in self))


def ms_ssim_loss(
    x: Tensor, x_hat: Tensor, bits_y: Tensor, bits_z: Tensor, lmbda: float | Tensor
) -> MsSsimRateDistortion:
    """λ·(1 − MS-SSIM(x, x̂)) + bpp_y + bpp_z of each image, as in CompressAI (arXiv 2011.03029).

    Arguments as in `rate_distortion_loss`. Raises ValueError as it does, and for images that are `too_small`.
    """
    rate = rate_distortion_loss(x, x_hat, bits_y, bits_z, 0.0)
    similarity = image_ms_ssim(x.float(), x_hat.float())
    return MsSsimRateDistortion(lmbda * (1 - similarity) + rate.bpp, *rate[1:], similarity)


def too_small(image: Tensor) -> bool:
    """Whether a side of an image (…, H, W) is below `MS_SSIM_SMALLEST_SIDE`: MS-SSIM is undefined."""
    return min(image.shape[-2:]) < MS_SSIM_SMALLEST_SIDE


def image_ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """MS-SSIM (Wang et al. 2003) of images (B, C, H, W) of one dtype in [0, 1], the mean over channels: (B,).

    Computed in the dtype of the images, also under autocast. If the contrast of a channel is anticorrelated on some
    scale, its MS-SSIM and the gradient are 0. Raises ValueError for `too_small` images.
    """
    if too_small(x):
        raise ValueError(f"MS-SSIM needs sides from {MS_SSIM_SMALLEST_SIDE} pixels, not {tuple(x.shape)}")
    kind = x.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        # Not channels-last, for which a GPU would use TF32 if the rest of the process does.
        return _ms_ssim(x.contiguous(), y.contiguous())


def _ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """`pytorch_msssim.ms_ssim` without its six copies from host to device, each of which synchronizes the GPU."""
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


Lmbda = float | Callable[[Tensor], Tensor]
"""λ; at variable rate the function that maps levels (B,) to λ (B,)."""


class Objective(Protocol):
    """The loss that a model is trained for."""

    fields: tuple[str, ...]
    """Names of the parts; those of `RateDistortion` first."""

    def __call__(self, x: Tensor, coded: Any, level: Tensor | None = None) -> Any:
        """The loss of a batch, (B,), and its parts, as a named tuple with `mean`.

        Images x (B, 3, H, W), their reconstructions and bits (`x_hat`, `bits_y`, `bits_z`), levels (B,) or None.
        """


class RateDistortionObjective:
    """The `Objective` of a codec: `rate_distortion_loss` or `ms_ssim_loss`."""

    def __init__(self, lmbda: Lmbda, distortion: Distortion = Distortion.mse) -> None:
        self._lmbda, self._ms_ssim = lmbda, distortion == Distortion.ms_ssim
        self.fields = (MsSsimRateDistortion if self._ms_ssim else RateDistortion)._fields

    def __call__(self, x: Tensor, coded: Any, level: Tensor | None = None) -> RateDistortion | MsSsimRateDistortion:
        """See `Objective`."""
        lmbda = self._lmbda
        if callable(lmbda):
            assert level is not None
            lmbda = lmbda(level)
        loss = ms_ssim_loss if self._ms_ssim else rate_distortion_loss
        return loss(x, coded.x_hat, coded.bits_y, coded.bits_z, lmbda)
