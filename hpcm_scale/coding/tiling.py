"""Tiled analysis and synthesis of large images, without seams.

Each tile is computed with a halo of the network's receptive field, which is then removed: every value has the same
inputs as without tiles. With window attention, tiles end at window borders. Tiles are squares whose size bounds the
memory of activations; it depends only on model and image size, so that encoder and decoder agree.
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
"""The largest activation of a tile has at most this many bytes."""


def analyse(g_a: nn.Sequential, x: Callable[[slice, slice], Tensor], size: tuple[int, int], tile: int) -> Tensor:
    """y (1, M, H/16, W/16) of an image of `size` (H, W); `x(rows, columns)` returns a part of it, (1, 3, h, w)."""
    rows, columns = (side // LATENT_STRIDE for side in size)
    y: Tensor | None = None
    cuts = _halo(g_a, LATENT_STRIDE), _alignment(g_a, LATENT_STRIDE)
    for outer, inner, within in _tiles(rows, columns, tile // LATENT_STRIDE, *cuts):
        piece = g_a(x(*(_scaled(part, LATENT_STRIDE) for part in outer)))[..., within[0], within[1]]
        if y is None:
            shape = (1, piece.shape[1], rows, columns)
            y = torch.empty(shape, dtype=piece.dtype, device=piece.device, memory_format=torch.channels_last)
        y[..., inner[0], inner[1]] = piece
    assert y is not None
    return y


def synthesise(g_s: nn.Sequential, y_hat: Tensor, tile: int, into: Callable[[Tensor, slice, slice], None]) -> None:
    """Call `into` with each part (1, 3, h, w) of the image of ŷ (1, M, H/16, W/16), and its rows and columns."""
    rows, columns = y_hat.shape[2:]
    for outer, inner, within in _tiles(rows, columns, tile // LATENT_STRIDE, _halo(g_s, 1), _alignment(g_s, 1)):
        piece = g_s(y_hat[..., outer[0], outer[1]])
        rows_within, columns_within = (_scaled(part, LATENT_STRIDE) for part in within)
        into(piece[..., rows_within, columns_within], *(_scaled(part, LATENT_STRIDE) for part in inner))


def tile_side(config: ModelConfig) -> int:
    """Side of a tile in pixels, including halos, a multiple of 64."""
    widths = [*config.channels, config.latent_channels]
    with torch.device("meta"):
        kinds = [blocks(config, width, stage, 1)[0] for stage, width in enumerate(widths, start=1)]
    # fp32 values per pixel of the largest activation, usually in a block of the first stage.
    values = max(block.peak_channels / 4**stage for stage, block in enumerate(kinds, start=1))
    return max(256, int(math.sqrt(ACTIVATION_BYTES / (4 * values))) // 64 * 64)


def _halo(network: nn.Sequential, stride: int) -> int:
    """Halo of an output, in latents. `stride`: pixels per latent over pixels per position of the input."""
    halo, layers = 0, list(_resolutions(network, stride))
    for layer, _ in layers:
        if isinstance(layer, Block):
            halo = layer.halo(halo)
        elif isinstance(layer, nn.ConvTranspose2d):
            halo = layer.stride[0] * halo + int(layer.padding[0])
        else:
            halo = math.ceil((halo + int(layer.padding[0])) / layer.stride[0])
    return math.ceil(halo * layers[-1][1])


def _alignment(network: nn.Sequential, stride: int) -> int:
    """Tiles begin at multiples of this many latents. `stride` as above."""
    blocks = [(layer, unit) for layer, unit in _resolutions(network, stride) if isinstance(layer, Block)]
    return math.lcm(*(math.ceil(layer.alignment * unit) for layer, unit in blocks))


def _resolutions(
    network: nn.Sequential, stride: int
) -> Iterator[tuple[Block | nn.Conv2d | nn.ConvTranspose2d, Fraction]]:
    """Layers, and latents per position of the output of each."""
    unit = Fraction(1, stride)
    for layer in network:
        if isinstance(layer, nn.ConvTranspose2d):
            unit /= layer.stride[0]
        elif isinstance(layer, nn.Conv2d):
            unit *= layer.stride[0]
        elif not isinstance(layer, Block):
            raise TypeError(f"tiling does not know the receptive field of {type(layer).__name__}")
        yield layer, unit


Part = tuple[slice, slice]


def _tiles(rows: int, columns: int, side: int, halo: int, alignment: int) -> Iterator[tuple[Part, Part, Part]]:
    """Tiles of a plane as (rows, columns): with halo, without, and the latter relative to the former."""
    for top in _cuts(rows, side, halo, alignment):
        for left in _cuts(columns, side, halo, alignment):
            outer, inner, within = zip(top, left, strict=True)
            yield outer, inner, within


def _cuts(length: int, side: int, halo: int, alignment: int) -> Iterator[tuple[slice, slice, slice]]:
    if length <= side:
        whole = slice(0, length)
        yield whole, whole, whole
        return
    halo = math.ceil(halo / alignment) * alignment
    step = max((side - 2 * halo) // alignment * alignment, halo, alignment)
    for start in range(0, length, step):
        stop = min(start + step, length)
        outer = slice(max(0, start - halo), min(length, stop + halo))
        yield outer, slice(start, stop), slice(start - outer.start, stop - outer.start)


def _scaled(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)
