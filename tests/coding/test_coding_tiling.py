"""Tile by tile is as in one piece."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hpcm_scale.coding import tiling
from hpcm_scale.coding.codec import Codec
from hpcm_scale.coding.tiling import analyse, synthesise, tile_side
from hpcm_scale.config.compose import compose_model
from hpcm_scale.config.schema import ModelConfig
from hpcm_scale.model.layers import PartialConvolution
from hpcm_scale.model.transforms import analysis, synthesis

NARROW = {"channels": [8, 16, 24], "latent_channels": 16}
CONFIGS = {
    "nano": ModelConfig(**NARROW),
    "like 1b": ModelConfig(
        **NARROW, stem_kernel=2, g_a_blocks=[3, 9, 3, 3], g_s_blocks=[3, 9, 3, 3], partial_ratio=2, expansion=4
    ),
    "uneven": ModelConfig(**NARROW, g_a_blocks=[1, 0, 3, 1], g_s_blocks=[2, 0, 1, 3]),
    "no blocks": ModelConfig(**NARROW, g_a_blocks=[0, 0, 0, 0], g_s_blocks=[0, 0, 0, 0]),
}
MARGINS = {"nano": (3, 3), "like 1b": (8, 9), "uneven": (3, 3), "no blocks": (1, 1)}
"""Of g_a and g_s, in latents, counted by hand."""


@pytest.fixture(params=CONFIGS)
def name(request) -> str:
    return request.param


def transforms(name: str) -> tuple[nn.Sequential, nn.Sequential]:
    """g_a and g_s with seeded weights, and biases, that carry far what comes from afar."""
    torch.manual_seed(0)
    pair = analysis(CONFIGS[name]), synthesis(CONFIGS[name])
    with torch.no_grad():
        for network in pair:
            for layer in network.modules():
                if isinstance(layer, PartialConvolution):
                    layer.weight.mul_(8)
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return pair


@torch.inference_mode()
def analysed(g_a: nn.Sequential, x: Tensor, tile: int) -> Tensor:
    return analyse(g_a, lambda rows, columns: x[..., rows, columns], tuple(x.shape[2:]), tile)


@torch.inference_mode()
def synthesised(g_s: nn.Sequential, y_hat: Tensor, tile: int) -> Tensor:
    """The picture; every pixel is handed over once."""
    picture = torch.zeros(1, 3, *(16 * side for side in y_hat.shape[2:]), dtype=y_hat.dtype)
    times = torch.zeros(picture.shape[2:])

    def into(piece: Tensor, rows: slice, columns: slice) -> None:
        picture[..., rows, columns] = piece
        times[rows, columns] += 1

    synthesise(g_s, y_hat, tile, into)
    assert (times == 1).all()
    return picture


def inputs(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """An image and a ŷ, not of each other."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.rand(1, 3, 16 * rows, 16 * columns, generator=generator)
    return x, torch.randn(1, 16, rows, columns, generator=generator).mul(8).round()


def error(found: Tensor, whole: Tensor) -> float:
    return ((found - whole).abs().max() / whole.abs().max()).item()


# Latents, latents, pixels. Steps are 2 and 10 latents for nano: many tiles, most without a border; odd counts of
# them; last ones of a single row; one row of tiles; one column; one tile.
PLACES = [(24, 40, 256), (16, 16, 128), (31, 21, 256), (11, 48, 256), (48, 11, 256), (16, 16, 256), (40, 24, 16)]


@pytest.mark.launch
def test_tiles_equal_the_whole(name):
    g_a, g_s = transforms(name)
    for rows, columns, tile in PLACES if name == "nano" else PLACES[:1]:
        x, y_hat = inputs(rows, columns)
        with torch.inference_mode():
            assert error(analysed(g_a, x, tile), g_a(x)) < 1e-5, (rows, columns, tile)
            assert error(synthesised(g_s, y_hat, tile), g_s(y_hat)) < 1e-5, (rows, columns, tile)


@pytest.mark.launch
def test_a_margin_too_narrow_by_one_is_seen(name, monkeypatch):
    """In float64, where what comes from farthest, the smallest part, stands out from rounding."""
    g_a, g_s = (network.double() for network in transforms(name))
    x, y_hat = (tensor.double() for tensor in inputs(24, 24))
    with torch.inference_mode():
        y, picture = g_a(x), g_s(y_hat)
    assert error(analysed(g_a, x, 256), y) < 1e-13
    assert error(synthesised(g_s, y_hat, 256), picture) < 1e-13
    margin = tiling._halo
    monkeypatch.setattr(tiling, "_halo", lambda network, stride: margin(network, stride) - 1)
    assert error(analysed(g_a, x, 256), y) > 1e-11
    assert error(synthesised(g_s, y_hat, 256), picture) > 1e-11


def test_margins_are_as_wide_as_the_networks_see(name):
    """What one output depends on, found by its gradient, ends within the last latent of the margin."""
    g_a, g_s = transforms(name)
    middle = 12
    x, y_hat = (tensor.double().requires_grad_() for tensor in inputs(2 * middle + 1, 2 * middle + 1))
    place = slice(middle, middle + 1)
    g_a.double()(x)[..., place, place].sum().backward()
    pixels = slice(16 * middle, 16 * middle + 16)
    g_s.double()(y_hat)[..., pixels, pixels].sum().backward()
    for network, stride, tensor, expected in ((g_a, 16, x, MARGINS[name][0]), (g_s, 1, y_hat, MARGINS[name][1])):
        seen = tensor.grad.abs().sum(dim=(0, 1, 2)).nonzero()[:, 0]
        before = stride * middle - seen.min().item()
        after = seen.max().item() - (stride * middle + stride - 1)
        assert math.ceil(max(before, after) / stride) == expected
        assert tiling._halo(network, stride) == expected


def test_a_layer_of_unknown_reach_is_refused():
    with pytest.raises(TypeError, match="receptive field of AvgPool2d"):
        tiling._halo(nn.Sequential(nn.AvgPool2d(2)), 1)


@pytest.mark.parametrize(("model", "least"), [("nano", 4096), ("mini", 2048), ("68m", 1024), ("1b", 512)])
def test_tiles_are_large_and_bounded(model, least):
    """The largest activation of a tile is below a GiB, and the halo is the smaller part of it."""
    config = compose_model(model)
    side = tile_side(config)
    assert side % 64 == 0 and side >= least
    assert 4 * side**2 / 4 * config.expansion * config.channels[0] <= 2**30


@pytest.mark.launch
def test_a_large_image_has_no_seams(model, photo, monkeypatch):
    """A photo in many tiles or in one: the same symbols and pixels, but for ties in rounding."""
    large = torch.cat([photo, photo.flip(1)], dim=1)[:, :1001, :743]
    whole = Codec(model)
    monkeypatch.setattr(tiling, "ACTIVATION_BYTES", 2**22)
    tiled = Codec(model)
    assert (whole._tile, tiled._tile) == (5760, 320)
    one, many = whole.encode(large), tiled.encode(large)
    assert len(many.data) == pytest.approx(len(one.data), rel=1e-3)
    assert ((one.y_hat - many.y_hat).abs() > 1e-3).float().mean() < 1e-3
    found, expected = (codec.reconstruct(one.y_hat, 1001, 743).short() for codec in (tiled, whole))
    difference = (found - expected).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    assert torch.equal(tiled.decompress(many.data), tiled.reconstruct(many.y_hat, 1001, 743))
