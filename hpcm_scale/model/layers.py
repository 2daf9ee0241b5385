"""The blocks HPCM is made of (arXiv 2507.19125, figures 3 and 4)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from hpcm_scale.config.schema import Precision


def reduced_precision(x: Tensor, precision: Precision) -> AbstractContextManager[None]:
    """Autocast for convolutions and context networks, where the configuration asks for it."""
    if precision == Precision.fp32 or not torch.amp.is_autocast_available(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, torch.bfloat16)


def full_precision(x: Tensor) -> AbstractContextManager[None]:
    """Leave autocast for the places that are fp32 always: y, z, scales, means, rates, pictures."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class Conv2d(nn.Conv2d):
    """Convolution in fp32 even under autocast, so that the residual stream after it is fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return super().forward(x.to(self.weight.dtype))


class ConvTranspose2d(nn.ConvTranspose2d):
    """Transposed convolution in fp32 even under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return super().forward(x.to(self.weight.dtype))


def down(inputs: int, outputs: int, *, kernel: int = 2, fp32: bool = False) -> nn.Conv2d:
    """Halve the resolution: (B, inputs, H, W) to (B, outputs, H/2, W/2)."""
    kind = Conv2d if fp32 else nn.Conv2d
    convolution = kind(inputs, outputs, kernel, stride=2, padding=(kernel - 2) // 2)
    return _variance_preserving(convolution, summands=inputs * kernel**2)


def up(inputs: int, outputs: int, *, kernel: int = 2, fp32: bool = False) -> nn.ConvTranspose2d:
    """Double the resolution: (B, inputs, H, W) to (B, outputs, 2H, 2W)."""
    kind = ConvTranspose2d if fp32 else nn.ConvTranspose2d
    convolution = kind(inputs, outputs, kernel, stride=2, padding=(kernel - 2) // 2)
    return _variance_preserving(convolution, summands=inputs * (kernel // 2) ** 2)


def _variance_preserving(convolution: nn.Module, summands: int) -> nn.Module:
    """torch's default weights would shrink a signal 30-fold on its way through four of these, and y to nothing."""
    nn.init.normal_(convolution.weight, std=summands**-0.5)
    nn.init.zeros_(convolution.bias)
    return convolution


class PartialConvolution(nn.Conv2d):
    """3×3 convolution of the first channels; the rest pass as they are."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__(channels // ratio, channels // ratio, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        convolved, untouched = x.split([self.in_channels, x.shape[1] - self.in_channels], dim=1)
        return torch.cat([super().forward(convolved), untouched], dim=1)


class ResidualBlock(nn.Module):
    """x + reduce(LeakyReLU(expand(spatial(x)))), with 1×1 convolutions around the non-linearity."""

    def __init__(self, spatial: nn.Module, channels: int, expansion: int) -> None:
        super().__init__()
        self.spatial = spatial
        self.expand = nn.Conv2d(channels, expansion * channels, 1)
        self.activation = nn.LeakyReLU(0.01)
        self.reduce = nn.Conv2d(expansion * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.reduce(self.activation(self.expand(self.spatial(x))))


def partial_block(channels: int, ratio: int, expansion: int) -> ResidualBlock:
    """PConvRB(C, r, m): the block of the transforms."""
    return ResidualBlock(PartialConvolution(channels, ratio), channels, expansion)


def depthwise_block(channels: int) -> ResidualBlock:
    """DWConvRB(C): the block of the context model."""
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    return ResidualBlock(depthwise, channels, 2)


class ChannelScale(nn.Module):
    """A learned factor per channel; a module of its own so that ZeRO-3 gathers it where it is read."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight
