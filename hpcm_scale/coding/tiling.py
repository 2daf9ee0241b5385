"""Analysis and synthesis of large images, tile by tile, without seams.

Each tile is computed with a margin as wide as the network sees, and the margin cut off: every value is
computed from what it would be computed from in one piece. Where attention has windows, tiles end between
two of them. Tiles are squares as large as bounds the activations; they depend on the model and the image's
size alone, so that encoder and decoder agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import torch
from torch import Tensor, nn

from hpcm_scale.config.schema import ModelConfig
from hpcm_scale.model.families import blocks
from hpcm_scale.model.layers import Block

LATENT_STRIDE = 16
ACTIVATION_BYTES = 2**30
"""The widest activation of a tile takes at most this much memory."""


def analyse(g_a: nn.Sequential, x: Callable[[slice, slice], Tensor], size: tuple[int, int], tile: int) -> Tensor:
    """y (1, M, H/16, W/16) of an image of `size` (H, W), which `x` gives piece by piece as (1, 3, h, w)."""
    rows, columns = (side // LATENT_STRIDE for side in size)
    y = None
    cuts = _margin(g_a, LATENT_STRIDE), _grid(g_a, LATENT_STRIDE)
    for outer, inner, within in _tiles(rows, columns, tile // LATENT_STRIDE, *cuts):
        piece = g_a(x(*(_scaled(part, LATENT_STRIDE) for part in outer)))[..., within[0], within[1]]
        if y is None:
            shape = (1, piece.shape[1], rows, columns)
            y = torch.empty(shape, dtype=piece.dtype, device=piece.device, memory_format=torch.channels_last)
        y[..., inner[0], inner[1]] = piece
    return y


def synthesise(g_s: nn.Sequential, y_hat: Tensor, tile: int, into: Callable[[Tensor, slice, slice], None]) -> None:
    """Hand the picture of ŷ (1, M, H/16, W/16) over, piece by piece: (1, 3, h, w) and its rows and columns."""
    rows, columns = y_hat.shape[2:]
    for outer, inner, within in _tiles(rows, columns, tile // LATENT_STRIDE, _margin(g_s, 1), _grid(g_s, 1)):
        piece = g_s(y_hat[..., outer[0], outer[1]])
        rows_within, columns_within = (_scaled(part, LATENT_STRIDE) for part in within)
        into(piece[..., rows_within, columns_within], *(_scaled(part, LATENT_STRIDE) for part in inner))


def tile_side(config: ModelConfig) -> int:
    """Side of a tile in pixels, margins included, a multiple of 64."""
    widths = [*config.channels, config.latent_channels]
    with torch.device("meta"):
        kinds = [blocks(config, width, stage, 1)[0] for stage, width in enumerate(widths, start=1)]
    # fp32 values per pixel of the widest activation: within a block of the first resolution, most often.
    values = max(block.widest / 4**stage for stage, block in enumerate(kinds, start=1))
    return max(256, int(math.sqrt(ACTIVATION_BYTES / (4 * values))) // 64 * 64)


def _margin(network: nn.Sequential, stride: int) -> int:
    """How far beyond its own place, in latents, an output looks. `stride`: latents' over the input's, in pixels."""
    spoilt, layers = 0, list(_resolutions(network, stride))
    for layer, _ in layers:
        if isinstance(layer, Block):
            spoilt = layer.spoilt(spoilt)
        elif isinstance(layer, nn.ConvTranspose2d):
            spoilt = layer.stride[0] * spoilt + layer.padding[0]
        else:
            spoilt = math.ceil((spoilt + layer.padding[0]) / layer.stride[0])
    return math.ceil(spoilt * layers[-1][1])


def _grid(network: nn.Sequential, stride: int) -> int:
    """Latents between two places where an input may be cut. `stride` as above."""
    grids = [layer.grid * unit for layer, unit in _resolutions(network, stride) if isinstance(layer, Block)]
    return math.lcm(*(math.ceil(grid) for grid in grids))


def _resolutions(network: nn.Sequential, stride: int) -> Iterator[tuple[nn.Module, Fraction]]:
    """Layers, and latents per position of what each gives."""
    unit = Fraction(1, stride)
    for layer in network:
        if isinstance(layer, nn.ConvTranspose2d):
            unit /= layer.stride[0]
        elif isinstance(layer, nn.Conv2d):
            unit *= layer.stride[0]
        elif not isinstance(layer, Block):
            raise TypeError(f"tiling does not know how far a {type(layer).__name__} looks")
        yield layer, unit


Part = tuple[slice, slice]


def _tiles(rows: int, columns: int, side: int, margin: int, grid: int) -> Iterator[tuple[Part, Part, Part]]:
    """Tiles of a plane: with margin, without, and the latter's place within the former; (rows, columns) each."""
    for top in _cuts(rows, side, margin, grid):
        for left in _cuts(columns, side, margin, grid):
            yield tuple(zip(top, left, strict=True))


def _cuts(length: int, side: int, margin: int, grid: int) -> Iterator[tuple[slice, slice, slice]]:
    if length <= side:
        yield (slice(0, length),) * 3
        return
    margin = math.ceil(margin / grid) * grid
    step = max((side - 2 * margin) // grid * grid, margin, grid)
    for start in range(0, length, step):
        stop = min(start + step, length)
        outer = slice(max(0, start - margin), min(length, stop + margin))
        yield outer, slice(start, stop), slice(start - outer.start, stop - outer.start)


def _scaled(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)
