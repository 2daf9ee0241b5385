"""Analysis and synthesis of large images, tile by tile, without seams.

Each tile is computed with a margin as wide as the network sees, and the margin cut off: every value is
computed from what it would be computed from in one piece. Tiles are squares as large as bounds the
activations; they depend on the model and the image's size alone, so that encoder and decoder agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hpcm_scale.config.schema import ModelConfig
from hpcm_scale.model.layers import ResidualBlock

LATENT_STRIDE = 16
ACTIVATION_BYTES = 2**30
"""The widest activation of a tile takes at most this much memory."""


def analyse(g_a: nn.Sequential, x: Callable[[slice, slice], Tensor], size: tuple[int, int], tile: int) -> Tensor:
    """y (1, M, H/16, W/16) of an image of `size` (H, W), which `x` gives piece by piece as (1, 3, h, w)."""
    rows, columns = (side // LATENT_STRIDE for side in size)
    y = None
    for outer, inner, within in _tiles(rows, columns, tile // LATENT_STRIDE, _margin(g_a, LATENT_STRIDE)):
        piece = g_a(x(*(_scaled(part, LATENT_STRIDE) for part in outer)))[..., within[0], within[1]]
        if y is None:
            shape = (1, piece.shape[1], rows, columns)
            y = torch.empty(shape, dtype=piece.dtype, device=piece.device, memory_format=torch.channels_last)
        y[..., inner[0], inner[1]] = piece
    return y


def synthesise(g_s: nn.Sequential, y_hat: Tensor, tile: int, into: Callable[[Tensor, slice, slice], None]) -> None:
    """Hand the picture of ŷ (1, M, H/16, W/16) over, piece by piece: (1, 3, h, w) and its rows and columns."""
    rows, columns = y_hat.shape[2:]
    for outer, inner, within in _tiles(rows, columns, tile // LATENT_STRIDE, _margin(g_s, 1)):
        piece = g_s(y_hat[..., outer[0], outer[1]])
        rows_within, columns_within = (_scaled(part, LATENT_STRIDE) for part in within)
        into(piece[..., rows_within, columns_within], *(_scaled(part, LATENT_STRIDE) for part in inner))


def tile_side(config: ModelConfig) -> int:
    """Side of a tile in pixels, margins included, a multiple of 64."""
    widths = [*config.channels, config.latent_channels]
    # fp32 values per pixel of the widest activation: within a block of the first resolution, most often.
    values = max(config.expansion * width / 4 ** (level + 1) for level, width in enumerate(widths))
    return max(256, int(math.sqrt(ACTIVATION_BYTES / (4 * values))) // 64 * 64)


def _margin(network: nn.Sequential, stride: int) -> int:
    """How far beyond its own place, in latents, an output looks. `stride`: latents' over the input's, in pixels."""
    reach, unit = 0.0, 1 / stride
    for layer in network:
        if isinstance(layer, ResidualBlock):
            reach += unit * (layer.spatial.kernel_size[0] // 2)
        elif isinstance(layer, nn.ConvTranspose2d):
            reach += unit * layer.padding[0]
            unit /= layer.stride[0]
        elif isinstance(layer, nn.Conv2d):
            reach += unit * layer.padding[0]
            unit *= layer.stride[0]
        else:
            raise TypeError(f"tiling does not know how far a {type(layer).__name__} looks")
    return math.ceil(reach)


Part = tuple[slice, slice]


def _tiles(rows: int, columns: int, side: int, margin: int) -> Iterator[tuple[Part, Part, Part]]:
    """Tiles of a grid: with margin, without, and the latter's place within the former; (rows, columns) each."""
    for top in _cuts(rows, side, margin):
        for left in _cuts(columns, side, margin):
            yield tuple(zip(top, left, strict=True))


def _cuts(length: int, side: int, margin: int) -> Iterator[tuple[slice, slice, slice]]:
    if length <= side:
        yield (slice(0, length),) * 3
        return
    step = max(side - 2 * margin, margin, 1)
    for start in range(0, length, step):
        stop = min(start + step, length)
        outer = slice(max(0, start - margin), min(length, stop + margin))
        yield outer, slice(start, stop), slice(start - outer.start, stop - outer.start)


def _scaled(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)
