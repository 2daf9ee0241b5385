"""The rate-distortion loss of a batch, image by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
