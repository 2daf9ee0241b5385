"""Swin transforms: attention in windows, shifted in every second block.

After SwinT-ChARM (Zhu et al., "Transformer-based transform coding", ICLR 2022) and STF (arXiv 2203.08450); the block is
that of arXiv 2103.14030. The strided convolutions of all families replace patch merging and splitting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcm_scale.config.checks import side_multiple
from hpcm_scale.config.schema import ModelConfig
from hpcm_scale.errors import UserError
from hpcm_scale.limits import Range, number
from hpcm_scale.model.arithmetic import attend
from hpcm_scale.model.families import Family, hpcm
from hpcm_scale.model.layers import Block, ChannelNorm, Pointwise

_WINDOW = Range(least=2, most=128)


@dataclass
class Options:
    """`model.options` of `model.family=swin`."""

    window: int = number(8, _WINDOW)
    """Side of the windows of g_a and g_s: a power of two."""
    head_channels: int = number(32, Range(least=1, most=1024))
    """Channels of an attention head; for widths that it does not divide, the nearest number that does."""
    hyper: bool = False
    """Whether h_a and h_s have Swin blocks, too; otherwise they have PConvRB."""
    hyper_window: int = number(4, _WINDOW)
    """Side of the windows of h_a and h_s: a power of two."""


class SwinBlock(Block):
    """Window attention, then a two-layer MLP at every position, each with a residual connection."""

    def __init__(self, channels: int, heads: int, window: int, shift: int, expansion: int) -> None:
        super().__init__()
        self.attention_norm = ChannelNorm(channels)
        self.attention = WindowAttention(channels, heads, window, shift)
        self.norm = ChannelNorm(channels)
        self.expand = Pointwise(channels, expansion * channels)
        self.reduce = Pointwise(expansion * channels, channels)
        self.alignment = window
        self.peak_channels = max(expansion * channels, 3 * channels, heads * window**2)

    def compute(self, x: Tensor) -> Tensor:
        x = self.attention(self.attention_norm(x), onto=x)
        return self.reduce(F.gelu(self.expand(self.norm(x))), onto=x)

    def branches(self) -> Iterable[nn.Conv2d]:
        return (self.attention.project, self.reduce)

    def halo(self, depth: int) -> int:
        """A window with one wrong position is wrong as a whole."""
        window, shift = self.attention.window, self.attention.shift
        return shift + math.ceil((depth - shift) / window) * window


class WindowAttention(nn.Module):
    """Self-attention in windows of (B, C, H, W), H and W multiples of the window.

    Windows are shifted down and right by `shift`, half a window or 0; those at the border are smaller.
    """

    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.query_key_value = Pointwise(channels, 3 * channels)
        self.position_bias = PositionBias(heads, window)
        self.project = Pointwise(channels, channels)

    def forward(self, x: Tensor, onto: Tensor) -> Tensor:
        """Attention of `x`, added to `onto`; all of one shape."""
        height, width = x.shape[2:]
        windows = (height // self.window, width // self.window)
        query, key, value = self._to_windows(self.query_key_value(self._rolled(x, -self.shift)))
        bias = self.position_bias()
        if self.shift:
            adjacent = _adjacent(*windows, self.window, self.shift, x.device)
            bias = bias.masked_fill(~adjacent[:, None], -math.inf).flatten(0, 1)
        attended = attend(query, key, value, bias)
        return onto + self._rolled(self.project(self._from_windows(attended, *windows)), self.shift)

    @staticmethod
    def _rolled(x: Tensor, by: int) -> Tensor:
        """Cyclic shift of rows and columns, as (B, H, W, C): on a GPU torch.roll loses other layouts."""
        return x.permute(0, 2, 3, 1).roll((by, by), (1, 2)).permute(0, 3, 1, 2) if by else x

    def _to_windows(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, 3·heads·d, H, W) to three of (B·windows, heads, window², d), or (B, windows·heads, …) if shifted.

        The bias, common to all windows or one for each, broadcasts in both cases.
        """
        batch, channels, height, width = x.shape
        w, d = self.window, channels // (3 * self.heads)
        x = x.permute(0, 2, 3, 1).reshape(batch, height // w, w, width // w, w, 3, self.heads, d)
        x = x.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, batch, -1, self.heads, w * w, d)
        return (x.flatten(2, 3) if self.shift else x.flatten(1, 2)).unbind(0)

    def _from_windows(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """The inverse for one of the three: (B, heads·d, H, W), channels-last."""
        w, d = self.window, x.shape[-1]
        x = x.reshape(-1, rows, columns, self.heads, w, w, d).permute(0, 1, 4, 2, 5, 3, 6)
        return x.reshape(-1, rows * w, columns * w, self.heads * d).permute(0, 3, 1, 2)


class PositionBias(nn.Module):
    """Learned relative position bias per head.

    Initially the logarithm of a Gaussian of the distance, so that attention is local as a convolution is
    (arXiv 2103.10697), not the mean of a window. A module of its own so that ZeRO-3 gathers it where it is read; one-
    dimensional, since it is not a factor of a matrix product.
    """

    offset: Tensor

    def __init__(self, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        offsets, log_gaussian = _offsets(window)
        self.weight = nn.Parameter(torch.tensor(log_gaussian).repeat(heads))
        self.register_buffer("offset", torch.tensor(offsets), persistent=False)

    def forward(self) -> Tensor:
        """(heads, window², window²)."""
        return self.weight.view(self.heads, -1)[:, self.offset]


@cache  # called by every block of every model whose parameters are counted
def _offsets(window: int) -> tuple[np.ndarray, np.ndarray]:
    """The index of the relative offset of each pair of positions, (window², window²), and for each offset the logarithm
    of a Gaussian, fp32 ((2·window − 1)²,)."""
    row, column = np.divmod(np.arange(window**2), window)
    down, right = (place[:, None] - place + window - 1 for place in (row, column))
    squares = np.arange(1 - window, window, dtype=np.float32) ** 2
    return down * (2 * window - 1) + right, -(squares[:, None] + squares).ravel() / 2


def _adjacent(rows: int, columns: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Which pairs of positions of shifted windows are in one part of the image: (windows, window², window²) bool."""
    down, right = (
        (torch.arange(count * window, device=device) >= count * window - shift).view(count, window)
        for count in (rows, columns)
    )
    place = (2 * down[:, None, :, None] + right[None, :, None, :]).reshape(rows * columns, window**2)
    return place[:, :, None] == place[:, None, :]


def heads_of(channels: int, head_channels: int) -> int:
    """Number of heads whose width divides the channels and is nearest, by ratio, to `head_channels`.

    Widths that are multiples of 8, which attention on GPUs requires to be fast, are preferred.
    """
    small = [heads for heads in range(1, math.isqrt(channels) + 1) if channels % heads == 0]
    divisors = [*small, *(channels // heads for heads in small)]
    divisors = [heads for heads in divisors if channels // heads % 8 == 0] or divisors
    return min(divisors, key=lambda heads: abs(math.log(channels / heads / head_channels)))


def _swin(
    config: ModelConfig, options: Options, channels: int, stage: int, index: int, setting: str = "window"
) -> Block:
    window, side = getattr(options, setting), side_multiple(config) >> stage
    if side % window:
        raise UserError(
            "window-size",
            f"model.options.{setting}",
            f"model.options.{setting}={window} does not fit at 1/{2**stage} of the image, where sides are multiples of "
            f"{side}; use a power of two up to {side}",
        )
    heads = heads_of(channels, options.head_channels)
    return SwinBlock(channels, heads, window, window // 2 if index % 2 else 0, config.expansion)


def block(config: ModelConfig, options: Options, channels: int, stage: int, index: int) -> Block:
    """The Swin block; every second one has shifted windows."""
    return _swin(config, options, channels, stage, index)


def hyper_block(config: ModelConfig, options: Options, channels: int, stage: int, index: int) -> Block:
    """The Swin block with `hyper_window`, or PConvRB."""
    if not options.hyper:
        return hpcm.FAMILY.hyper_block(config, hpcm.FAMILY.options(), channels, stage, index)
    return _swin(config, options, channels, stage, index, "hyper_window")


FAMILY = Family(
    block=block,
    hyper_block=hyper_block,
    options=Options,
    base=ModelConfig(channels=[128, 192, 256], g_a_blocks=[2, 2, 6, 2], g_s_blocks=[2, 6, 2, 2]),  # SwinT-ChARM's g_a
    multiple=32,
)
