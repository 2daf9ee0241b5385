"""HPCM, the learned image codec (arXiv 2507.19125; sizes after arXiv 2508.09075)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpcm_scale.config.checks import side_multiple
from hpcm_scale.config.schema import Checkpointing, ModelConfig, Precision
from hpcm_scale.entropy.generalized_gaussian import Formula, bits
from hpcm_scale.model.context import ContextModel, Place
from hpcm_scale.model.layers import cast_once, configure_layers, full_precision, reduced_precision
from hpcm_scale.model.transforms import analysis, hyper_analysis, hyper_synthesis, synthesis
from hpcm_scale.model.variable_rate import level_of, mix_of


class Coded(NamedTuple):
    """The result of a forward pass; all fp32."""

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


def quantize(value: Tensor, mean: Tensor, gain: Tensor | None = None) -> Tensor:
    """round((value − mean)·gain) / gain + mean, with a straight-through gradient; `gain` defaults to 1.

    `value` gets the gradient of the result, `mean` none, and the gain that of the rounding error divided by it.
    """
    return _Quantize.apply(value, mean, gain)


def symbols_of(value: Tensor, mean: Tensor, gain: Tensor | None = None) -> Tensor:
    """round((value − mean)·gain): the integers to code, as fp32."""
    residual = value - mean
    return (residual if gain is None else residual * gain).round()


def value_of(symbols: Tensor, mean: Tensor, gain: Tensor | None = None) -> Tensor:
    """symbols / gain + mean: the inverse of `symbols_of` but for rounding."""
    return (symbols if gain is None else symbols / gain) + mean


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, mean: Tensor, gain: Tensor | None) -> Tensor:
        symbols = symbols_of(value, mean, gain)
        if gain is not None:
            ctx.save_for_backward((value - mean) * gain - symbols, gain)
        return value_of(symbols, mean, gain)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, Tensor | None]:
        if not ctx.saved_tensors:
            return gradient, None, None
        error, gain = ctx.saved_tensors
        return gradient, None, (gradient * error / gain.square()).sum_to_size(gain.shape)


class Rate(nn.Module):
    """Bits per image of a latent: of its rounded values, or in training with additive uniform noise."""

    def __init__(self, formula: Formula) -> None:
        super().__init__()
        self.formula: Formula = formula

    def forward(
        self, value: Tensor, mean: Tensor, scale: Tensor, noise: Tensor | None, gain: Tensor | None = None
    ) -> Tensor:
        """Bits (B,) of a latent (B, C, H, W) fp32; means, scales, gains and noise broadcast to its shape."""
        residual = value - mean
        if gain is not None:
            residual, scale = residual * gain, scale * gain
        coded = residual.round() if noise is None else residual + noise
        return bits(coded, scale, formula=self.formula).sum(dim=(1, 2, 3))


class HyperPrior(nn.Module):
    """Learned mean and scale per channel of z."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scales = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, z: Tensor, noise: Tensor | None, rate: Rate) -> tuple[Tensor, Tensor]:
        """ẑ and its bits per image (B,), of z (B, N, H/64, W/64) fp32."""
        return quantize(z, self.means), rate(z, self.means, self.scales, noise)


class HPCM(nn.Module):
    """The codec. `forward` estimates rates and reconstructions; its control flow does not depend on data.

    Args:
        config: structure and widths.
        precision: of convolutions and context networks; weights, latents, rates and images are fp32.
        formula: of the likelihood (`entropy.generalized_gaussian`); "public" only for comparison with the public
            implementation.
        activation_checkpointing: which activations the backward pass recomputes.

    Images in channels-last memory format are faster; results in the contiguous format differ only by rounding.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        precision: Precision = Precision.fp32,
        formula: Formula = "survival",
        activation_checkpointing: Checkpointing = Checkpointing.none,
    ) -> None:
        super().__init__()
        self.config, self.precision = config, precision
        self.rate = Rate(formula)
        self.g_a, self.g_s = analysis(config), synthesis(config)
        self.h_a, self.h_s = hyper_analysis(config), hyper_synthesis(config)
        self.hyper_prior = HyperPrior(config.hyper_latent_channels)
        self.context = ContextModel(config)
        recompute = activation_checkpointing != Checkpointing.none
        steps = activation_checkpointing == Checkpointing.steps
        # A recomputed step recomputes its blocks.
        self._pointwise = configure_layers(
            self, precision, lambda name: recompute and not (steps and name.startswith("context."))
        )
        self.context.recompute = steps

    @property
    def multiple(self) -> int:
        """Heights and widths of inputs are multiples of this many pixels."""
        return side_multiple(self.config)

    def latent_shapes(self, height: int, width: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes (channels, rows, columns) of y and z of one image of height×width pixels."""
        y = (self.config.latent_channels, height // 16, width // 16)
        z = (self.config.hyper_latent_channels, height // 64, width // 64)
        return y, z

    def mix(self, level: Tensor | float | None, images: int = 1) -> Tensor | None:
        """Interpolation weights (B, levels) between the levels of a variable-rate model (`variable_rate.mix_of`).

        Args:
            level: (B,) fp32, or one number for all `images`; None means the level of λ = `rate.reference`.
            images: B, where `level` is no tensor.

        Returns None for a fixed-rate model. Raises ValueError if a fixed-rate model is given a level.
        """
        rate = self.config.rate
        if rate.levels == 1:
            if level is not None:
                raise ValueError("a fixed-rate model has no levels")
            return None
        if not isinstance(level, Tensor):
            number = level_of(rate, rate.reference) if level is None else level
            level = torch.full((images,), number, device=next(self.parameters()).device)
        return mix_of(level, rate.levels)

    def forward(self, x: Tensor, noise: Noise | None = None, level: Tensor | None = None) -> Coded:
        """Rates and reconstructions of images (B, 3, H, W), fp32 in [0, 1], H and W multiples of `multiple`.

        With `noise` the likelihoods are those of training (additive uniform noise), without it those of the rounded
        symbols. Latents are rounded in both cases. `level`: see `mix`.
        """
        with reduced_precision(x, self.precision), cast_once(self._pointwise, x):
            return self._code(x, noise, self.mix(level, len(x)))

    def _code(self, x: Tensor, noise: Noise | None, mix: Tensor | None) -> Coded:
        y = self.g_a(x)
        z = self.h_a(y)
        with full_precision(x):
            z_hat, bits_z = self.hyper_prior(z, noise.z if noise else None, self.rate)
            gains = self.context.gains(mix) if self.context.gains else None
        y_grids = self.context.order.grids(y)

        def code(place: Place, _: Tensor, means: Tensor) -> Tensor:
            return quantize(y_grids[place.level], means, gains)

        y_hat, parameters = self.context.traverse(self.h_s(z_hat), code, mix)
        with full_precision(x):
            scales, means = parameters.chunk(2, dim=1)
            bits_y = self.rate(y, means, scales, noise.y if noise else None, gains)
        return Coded(self.g_s(y_hat), bits_y, bits_z)
