"""What a family of transforms must honour; a new one is tested by being there (docs/families.md)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_models import images, loss_and_gradients, noise, small
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpcm_scale.coding import tiling
from hpcm_scale.coding.codec import Codec
from hpcm_scale.coding.container import unpack
from hpcm_scale.coding.tiling import analyse, synthesise
from hpcm_scale.compute.tracker import forward_flops
from hpcm_scale.config.schema import Checkpointing, Fusion, ModelConfig, Precision
from hpcm_scale.errors import UserError
from hpcm_scale.model import families
from hpcm_scale.model.arithmetic import Kernels, use_kernels
from hpcm_scale.model.compiled import compile_regions
from hpcm_scale.model.families.swin import heads_of
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.layers import Block, Pointwise
from hpcm_scale.model.parameters import on_meta
from hpcm_scale.model.transforms import analysis, synthesis
from hpcm_scale.model.weights import load_weights, save_weights

KINDS = {name: (name, {}) for name in families.names()} | {
    "swin, hyper too": ("swin", {"hyper": True, "window": 4, "hyper_window": 2, "head_channels": 3})
}
"""Every family as it comes, and with settings that change what is built."""


def config_of(kind: str) -> ModelConfig:
    """A small model with two blocks, so that both kinds of windows occur, at most resolutions."""
    family, options = KINDS[kind]
    blocks = {"g_a_blocks": [2, 1, 2, 2], "g_s_blocks": [2, 2, 1, 2], "hyper_blocks": [1, 2]}
    return replace(small(Fusion.none), name=kind, family=family, options=options, **blocks)


def build(kind: str, **options) -> HPCM:
    """With biases that are not zero, as they are after training."""
    torch.manual_seed(0)
    model = HPCM(config_of(kind), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(params=families.names())
def name(request) -> str:
    return request.param


@pytest.mark.parametrize("precision", Precision)
def test_latents_and_images_are_fp32_whatever_the_image(kind, precision):
    """Sides are multiples of 128 pixels, and need not be alike."""
    model, reduced = build(kind, precision=precision), []
    for layer in model.modules():
        if isinstance(layer, Pointwise):
            layer.register_forward_hook(lambda _, inputs, output: reduced.append(output.dtype == torch.bfloat16))
    for height, width in ((128, 384), (256, 128)):
        x = images(2, height, width)
        with torch.no_grad():
            coded = model(x, noise(model, x))
            y = model.g_a(x)
            found = {"y": y, "x_hat": coded.x_hat, "bits": coded.bits_y, "z": model.h_a(y)}
        shapes = [(2, *shape) for shape in model.latent_shapes(height, width)]
        assert found["y"].shape == shapes[0] and found["z"].shape == shapes[1]
        assert coded.x_hat.shape == x.shape and coded.bits_y.shape == (2,)
        assert {name for name, tensor in found.items() if tensor.dtype != torch.float32} == set()
        assert all(tensor.isfinite().all() for tensor in found.values())
    assert any(reduced) == (precision == Precision.bf16)


def test_every_parameter_learns(kind):
    _, gradients = loss_and_gradients(build(kind), images(2, 128, 128))
    assert {name for name, gradient in gradients.items() if not gradient.isfinite().all()} == set()
    assert {name for name, gradient in gradients.items() if not gradient.any()} == set()


def test_an_untrained_block_leaves_most_of_the_stream_as_it_is(kind):
    """So that depth does not make the first steps of training different: a branch adds 1 to 50 % to the variance."""
    config = config_of(kind)
    x = torch.randn(4, 64, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for block in families.blocks(config, 64, 2, 2):
        with torch.no_grad():
            added = block(x) - x
        assert 0.01 < added.var() / x.var() < 0.5


def test_channels_last_is_the_plain_format(name):
    """fp32: to 1e-6 of the loss and 1e-4 of every gradient; and every block keeps the format it is given."""
    x = images(2, 128, 128)
    with use_kernels(Kernels.reference):
        expected, gradients = loss_and_gradients(build(name), x.contiguous())
    model, last = build(name), set()
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_hook(
                lambda _, inputs, output: last.add(output.is_contiguous(memory_format=torch.channels_last))
            )
    loss, fast = loss_and_gradients(model, x)
    assert last == {True}
    assert loss == pytest.approx(expected, rel=1e-6)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for key, gradient in gradients.items():
        scale = gradient.abs().max() + 1e-4 * largest  # some gradients are zero but for rounding
        assert (fast[key] - gradient).abs().max() / scale < 1e-4, key


def test_recomputing_changes_nothing(kind):
    x = images(1, 128, 128)
    loss, gradients = loss_and_gradients(build(kind, precision=Precision.bf16), x)
    again, recomputed = loss_and_gradients(
        build(kind, precision=Precision.bf16, activation_checkpointing=Checkpointing.blocks), x
    )
    assert again == loss
    assert {name for name, gradient in gradients.items() if not torch.equal(recomputed[name], gradient)} == set()


def _two_layers(c: int, m: int) -> int:
    return 2 * m * c * c


BY_HAND = {
    # multiply-accumulates of a position of C channels; m: expansion
    "hpcm": lambda c, m: (c // 4) ** 2 * 9 + _two_layers(c, m),
    "swin": lambda c, m: 3 * c * c + 2 * 64 * c + c * c + _two_layers(c, m),
    "convnext": lambda c, m: 49 * c + _two_layers(c, m),
}


def test_all_arithmetic_is_counted(name):
    """Of one block against a count by hand, shifted or not; no transform has an operation without a formula."""
    config = config_of(name)
    channels, height, width = 24, 32, 16
    x = torch.empty(3, channels, height, width, device="meta")
    with torch.device("meta"):
        blocks = families.blocks(config, channels, 2, 2)
    for block in blocks:
        assert forward_flops(block, x) == 2 * 3 * height * width * BY_HAND[name](channels, config.expansion)
    model = on_meta(config)
    y, z = model.latent_shapes(256, 128)
    inputs = {model.g_a: (3, 256, 128), model.h_a: y, model.h_s: z, model.g_s: y}
    for network, shape in inputs.items():
        once, twice = (forward_flops(network, torch.empty(count, *shape, device="meta")) for count in (1, 2))
        assert twice == 2 * once > 0


class _Widest(TorchDispatchMode):
    """The most channels that a result has, of a plane of so many positions."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.positions, self.found = positions, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not func.is_view:
                self.found = max(self.found, leaf.numel() / self.positions)
        return result


def test_the_widest_activation_is_no_wider_than_said(kind):
    """Tiles are made as large as it allows."""
    for channels in (8, 96):
        x = torch.empty(1, channels, 64, 64, device="meta")
        with torch.device("meta"):
            blocks = families.blocks(config_of(kind), channels, 2, 2)
        for block in blocks:
            with torch.no_grad(), _Widest(64 * 64) as watch:
                block(x)
            assert watch.found <= block.peak_channels <= 2 * watch.found


@pytest.mark.launch
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name == "swin" else ()) for name in families.names()]
)
def test_blocks_compile_without_breaks_once_for_all_sizes(name):
    """Every one has to be one graph, or this raises; in training one for a shape, in evaluation one for all."""
    torch._dynamo.reset()
    counters.clear()
    x = torch.randn(2, 16, 16, 24, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    torch.manual_seed(0)
    for block in families.blocks(config_of(name), 16, 2, 2):
        expected = block(x)
        expected.square().sum().backward()
        gradients = {key: parameter.grad.clone() for key, parameter in block.named_parameters()}
        block.zero_grad()
        compile_regions(block, backend="eager")
        result = block(x)
        result.square().sum().backward()
        torch.testing.assert_close(result, expected)
        for key, parameter in block.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-3)
    with torch.no_grad():  # of the last one alone: symbolic shapes take seconds
        block(x)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert block(x.mT.contiguous(memory_format=torch.channels_last)).shape == x.mT.shape
    assert not counters["graph_break"]
    torch._dynamo.reset()


REACH = {"swin": {"window": 4}, "convnext": {"kernel": 5}}
"""Options under which tiles of small pictures have middles, where the family has such."""


def transforms(name: str) -> tuple[nn.Sequential, nn.Sequential]:
    """g_a and g_s in float64, where what comes from farthest, the smallest part, stands out from rounding."""
    config = replace(config_of(name), options=REACH.get(name, {}))
    torch.manual_seed(0)
    pair = analysis(config).double(), synthesis(config).double()
    with torch.no_grad():
        for network in pair:
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return pair


@torch.no_grad()
def off(network: nn.Sequential, x: Tensor, tile: int) -> float:
    """How far what a transform gives in tiles is from what it gives in one piece, by the largest value."""
    whole = network(x)
    if x.shape[1] == 3:
        found = analyse(network, lambda rows, columns: x[..., rows, columns], tuple(x.shape[2:]), tile)
    else:
        found = torch.full_like(whole, math.nan)

        def into(piece: Tensor, rows: slice, columns: slice) -> None:
            found[..., rows, columns] = piece

        synthesise(network, x, tile, into)
    return ((found - whole).abs().max() / whole.abs().max()).item()


@pytest.mark.launch
def test_tiles_equal_the_whole_and_overlap_no_more_than_they_must(name, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    g_a, g_s = transforms(name)
    inputs = {
        g_a: torch.rand(1, 3, 384, 448, generator=generator).double(),
        g_s: torch.randn(1, 16, 24, 28, generator=generator).double(),
    }
    for network, x in inputs.items():
        assert off(network, x, 256) < 1e-12
    halo, alignment = tiling._halo, tiling._alignment
    monkeypatch.setattr(tiling, "_halo", lambda network, stride: halo(network, stride) - alignment(network, stride))
    for network, x in inputs.items():
        assert off(network, x, 256) > 1e-11


def test_an_image_comes_back_from_its_file(kind, tmp_path):
    """Of any size, by weights that were saved and loaded: the decoder reaches the encoder's ŷ to the bit."""
    model, path = build(kind).eval(), tmp_path / "weights.safetensors"
    save_weights(path, model.state_dict(), model.config, {"lmbda": 0.013})
    loaded, _ = load_weights(path)
    assert loaded.config == model.config
    encoder, decoder = Codec(model), Codec(loaded)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 100, 130), generator=generator, dtype=torch.uint8)
    encoded = encoder.encode(pixels)
    assert torch.equal(decoder.decode(unpack(encoded.data)), encoded.y_hat)
    assert torch.equal(decoder.decompress(encoded.data), encoder.reconstruct(encoded.y_hat, 100, 130))


def test_all_blocks_are_of_the_family():
    """No family's blocks are another's, but for those that its settings leave to HPCM."""
    found = {}
    for kind in KINDS:
        model = on_meta(config_of(kind))
        found[kind] = [
            {type(block).__name__ for block in network if isinstance(block, Block)}
            for network in (model.g_a, model.g_s, model.h_a, model.h_s)
        ]
    assert found == {
        "hpcm": 4 * [{"ResidualBlock"}],
        "convnext": 4 * [{"ConvNeXtBlock"}],
        "swin": 2 * [{"SwinBlock"}] + 2 * [{"ResidualBlock"}],
        "swin, hyper too": 4 * [{"SwinBlock"}],
    }


@pytest.mark.parametrize(
    ("channels", "width", "heads"),
    [
        (96, 32, 3),
        (8, 32, 1),
        (24, 32, 1),
        (40, 32, 1),
        (48, 32, 2),
        (80, 32, 2),
        (320, 32, 10),
        (37, 32, 1),
        (74, 32, 2),
    ],
)
def test_heads_for_any_width(channels, width, heads):
    assert heads_of(channels, width) == heads and channels % heads == 0


MISTAKES = {
    "unknown family": ({"family": "swim"}, "unknown-family", "did you mean swin"),
    "no options": ({"family": "hpcm", "options": {"window": 8}}, "unknown-option", "omit model.options"),
    "unknown option": ({"family": "swin", "options": {"windows": 8}}, "unknown-option", "its options are window, "),
    "wrong type": ({"family": "swin", "options": {"window": "wide"}}, "option-type", "model.options.window=wide "),
    "window": ({"family": "swin", "options": {"window": 16}}, "window-size", "at 1/16 .* multiples of 8; "),
    "odd window": ({"family": "swin", "options": {"window": 7}}, "window-size", "at 1/2 .* power of two"),
    "hyper": ({"family": "swin", "options": {"hyper": True, "hyper_window": 8}}, "window-size", "at 1/32 .* to 4"),
    "heads": (
        {"family": "swin", "options": {"head_channels": 0}},
        None,
        "head_channels=0 must be at least 1 and at most 1,024",
    ),
    "kernel": ({"family": "convnext", "options": {"kernel": 6}}, "even-kernel", "kernel=6 must be odd"),
}


@pytest.mark.parametrize(("changes", "code", "detail"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_refused(changes, code, detail):
    with pytest.raises(UserError, match=detail) as refused:
        families.check(replace(small(Fusion.none), **changes))
    assert code in (None, refused.value.code)


def test_settings_have_defaults_and_are_filled_in(kind):
    family, options = KINDS[kind]
    families.check(config_of(kind))
    assert families.options_of(config_of(kind)) == families.family(family).options(**options)
