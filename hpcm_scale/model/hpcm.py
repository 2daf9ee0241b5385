"""HPCM, the learned image codec (arXiv 2507.19125; sizes after arXiv 2508.09075)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpcm_scale.config.checks import side_multiple
from hpcm_scale.config.schema import ModelConfig, Precision
from hpcm_scale.entropy.generalized_gaussian import bits
from hpcm_scale.model.context import ContextModel
from hpcm_scale.model.layers import full_precision, reduced_precision
from hpcm_scale.model.transforms import analysis, hyper_analysis, hyper_synthesis, synthesis


class Coded(NamedTuple):
    """What a forward pass through the codec gives; all fp32."""

    x_hat: Tensor
    """(B, 3, H, W) reconstruction, not clamped."""
    bits_y: Tensor
    """(B,) estimated bits of y per image."""
    bits_z: Tensor
    """(B,) estimated bits of z per image."""


class Noise(NamedTuple):
    """Uniform noise in [−½, ½) for the training likelihoods, shaped as the latents."""

    y: Tensor
    z: Tensor


def round_through(x: Tensor) -> Tensor:
    """Round to the nearest integer; the gradient passes as if nothing had happened."""
    return x.detach().round() + (x - x.detach())  # exactly the integer: x − x is 0


class HyperPrior(nn.Module):
    """Mean and scale per channel of z."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scales = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, z: Tensor, noise: Tensor | None, formula: str) -> tuple[Tensor, Tensor]:
        """z (B, N, h, w) fp32 to ẑ of the same shape and its bits per image (B,)."""
        residual = z - self.means
        rounded = round_through(residual)
        coded = rounded if noise is None else residual + noise
        return rounded + self.means, bits(coded, self.scales, formula=formula).sum(dim=(1, 2, 3))


class HPCM(nn.Module):
    """The codec: `forward` estimates rate and reconstruction; nothing in it depends on data.

    `precision` is that of convolutions and context networks; weights, latents, rates and pictures are fp32.
    `formula` picks the likelihood's arithmetic (`entropy.generalized_gaussian`); "public" is for
    comparison with the public implementation only.
    """

    def __init__(
        self, config: ModelConfig, *, precision: Precision = Precision.fp32, formula: str = "survival"
    ) -> None:
        super().__init__()
        self.config, self.precision, self.formula = config, precision, formula
        self.g_a, self.g_s = analysis(config), synthesis(config)
        self.h_a, self.h_s = hyper_analysis(config), hyper_synthesis(config)
        self.hyper_prior = HyperPrior(config.hyper_latent_channels)
        self.context = ContextModel(config)

    @property
    def multiple(self) -> int:
        """Sides of the input must be multiples of this many pixels."""
        return side_multiple(self.config)

    def latent_shapes(self, height: int, width: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes (channels, rows, columns) of one image's y and z."""
        y = (self.config.latent_channels, height // 16, width // 16)
        z = (self.config.hyper_latent_channels, height // 64, width // 64)
        return y, z

    def forward(self, x: Tensor, noise: Noise | None = None) -> Coded:
        """Code a batch of images (B, 3, H, W), fp32 in [0, 1], H and W multiples of `multiple`.

        With `noise` the likelihoods are those of training (additive uniform noise); without, those of
        the rounded symbols. The values that go on are rounded in both.
        """
        with reduced_precision(x, self.precision):
            return self._code(x, noise)

    def _code(self, x: Tensor, noise: Noise | None) -> Coded:
        y = self.g_a(x)
        z = self.h_a(y)
        with full_precision(x):
            z_hat, bits_z = self.hyper_prior(z, noise.z if noise else None, self.formula)
        y_values = self.context.order.split(y)
        y_noise = self.context.order.split(noise.y) if noise else None
        step_bits = []

        def quantize(step: int, scales: Tensor, means: Tensor) -> Tensor:
            with full_precision(x):
                residual = y_values[step] - means
                rounded = round_through(residual)
                coded = residual + y_noise[step] if y_noise else rounded
                step_bits.append(bits(coded, scales, formula=self.formula).sum(dim=(0, 2, 3, 4)))
                return rounded + means

        y_hat = self.context.traverse(self.h_s(z_hat), quantize)
        return Coded(self.g_s(y_hat), torch.stack(step_bits).sum(dim=0), bits_z)
