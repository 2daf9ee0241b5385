"""Whatever makes the network fast leaves its loss and gradients as they are."""

from __future__ import annotations

import pytest
import torch
from seeded_models import small_1b
from small_models import images, loss_and_gradients, noise, small
from torch import nn

from hpcm_scale.config.schema import Checkpointing, Fusion, HyperPlacement, ModelConfig, Precision
from hpcm_scale.model import layers
from hpcm_scale.model.arithmetic import Kernels, attend, use_kernels
from hpcm_scale.model.context import WindowFusion
from hpcm_scale.model.hpcm import HPCM, Noise
from hpcm_scale.model.layers import Pointwise, ResidualBlock, leaky_relu, set_arithmetic
from hpcm_scale.model.parameters import on_meta
from hpcm_scale.objective import rate_distortion_loss
from hpcm_scale.training.engines.base import propagate_non_finite
from hpcm_scale.training.optimizer import clip

CONFIGS = {
    "attention": small(),
    "no fusion": small(Fusion.none),
    "upstream": small(placement=HyperPlacement.upstream),
    "1b": small_1b(),
}


def build(config: ModelConfig, **options) -> HPCM:
    torch.manual_seed(0)
    return HPCM(config, **options)


@pytest.mark.parametrize(
    ("config", "products"),
    [(CONFIGS["attention"], False), *((config, True) for config in CONFIGS.values())],
    ids=["attention, convolutions", *CONFIGS],
)
def test_the_fast_way_is_the_plain_one(config, products, monkeypatch):
    """fp32: to 1e-6 of the loss and 1e-4 of every gradient (largest difference by largest entry)."""
    x = images(2)
    with use_kernels(Kernels.reference):
        expected, gradients = loss_and_gradients(build(config), x.contiguous())
    monkeypatch.setattr(layers, "product_is_faster", lambda x, layer: products)
    loss, fast = loss_and_gradients(build(config), x)
    assert loss == pytest.approx(expected, rel=1e-6)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        scale = gradient.abs().max() + 1e-4 * largest  # some gradients are zero but for rounding
        assert (fast[name] - gradient).abs().max() / scale < 1e-4, name


@pytest.mark.parametrize(
    ("precision", "checkpoint"), [(Precision.fp32, Checkpointing.blocks), (Precision.bf16, Checkpointing.steps)]
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_recomputing_changes_nothing(config, precision, checkpoint):
    x = images(1)
    loss, gradients = loss_and_gradients(build(config, precision=precision), x)
    again, recomputed = loss_and_gradients(build(config, precision=precision, activation_checkpointing=checkpoint), x)
    assert again == loss
    for name, gradient in gradients.items():
        assert torch.equal(recomputed[name], gradient), name


def test_what_is_recomputed_is_not_kept():
    kept = {}
    for checkpoint in Checkpointing:
        model, x, sizes = build(small(), activation_checkpointing=checkpoint), images(1), {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            coded = model(x, noise(model, x))
        kept[checkpoint] = sum(sizes.values())
        del coded
    assert kept[Checkpointing.none] > 2 * kept[Checkpointing.blocks] > 2 * kept[Checkpointing.steps]


@pytest.mark.parametrize("precision", Precision)
def test_channels_stay_last(precision):
    """In every block, from image to image: one layer that returned another layout would slow down all after it."""
    model, x = build(small(), precision=precision), images(2)
    seen = set()

    def watch(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        for tensor in (*inputs, output):
            seen.add((type(layer).__name__, tensor.is_contiguous(memory_format=torch.channels_last)))

    for layer in model.modules():
        if isinstance(layer, (ResidualBlock, WindowFusion, Pointwise)):
            layer.register_forward_hook(watch)
    model(x, noise(model, x))
    assert seen == {("ResidualBlock", True), ("WindowFusion", True), ("Pointwise", True)}


def test_leaky_relu_and_its_gradient():
    x = torch.randn(1000, requires_grad=True)
    gradient = torch.randn(1000)
    expected = torch.autograd.grad(nn.functional.leaky_relu(x, 0.01), x, gradient)
    result = leaky_relu(x)
    assert torch.equal(result, nn.functional.leaky_relu(x, 0.01))
    assert torch.equal(torch.autograd.grad(result, x, gradient)[0], expected[0])


def test_attention_in_bf16_is_as_near_as_torchs_own():
    torch.manual_seed(0)
    exact = [torch.randn(6, 4, 16, 20) for _ in range(3)]
    expected = nn.functional.scaled_dot_product_attention(*exact)
    reduced = [x.bfloat16() for x in exact]
    errors = [(way(*reduced) - expected).abs().max() for way in (attend, nn.functional.scaled_dot_product_attention)]
    assert errors[0] <= 1.5 * errors[1] < 0.05


def test_results_that_are_fp32_stay_so_where_products_are_reduced():
    """bf16 numbers multiplied, fp32 sums: nearer than a bf16 result could be."""
    layer = Pointwise(256, 256, fp32=True)
    layer.reduced = True
    x = images(1, 8, 8)[:, :1].expand(1, 256, 8, 8).contiguous(memory_format=torch.channels_last)
    exact = nn.Conv2d.forward(layer, x)
    try:
        set_arithmetic(Precision.bf16)
        with torch.autocast("cpu", torch.bfloat16):
            result = layer(x)
    finally:
        set_arithmetic(Precision.fp32)
    assert result.dtype == torch.float32
    assert (result - exact).abs().max() < 1e-2 * exact.abs().max()
    assert not torch.equal(result, result.bfloat16().float())
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert not torch.equal(result, exact)


def test_without_gradients_layers_are_fused_and_say_the_same():
    x = images(2)
    model = build(small())
    with torch.no_grad():
        with use_kernels(Kernels.reference):
            expected = model(x.contiguous())
        fast = model(x)
    assert (fast.x_hat - expected.x_hat).abs().max() < 1e-5
    torch.testing.assert_close(fast.bits_y, expected.bits_y, rtol=1e-5, atol=0.1)


def test_nothing_in_a_step_looks_at_a_value():
    """On the meta device there are no values: whatever asks for one raises."""
    model = on_meta(small())
    x = torch.empty(2, 3, 256, 256, device="meta").to(memory_format=torch.channels_last)
    coded = model(x, Noise(*(torch.empty(2, *shape, device="meta") for shape in model.latent_shapes(256, 256))))
    loss = rate_distortion_loss(x, coded.x_hat, coded.bits_y, coded.bits_z, 0.013).mean().loss
    propagate_non_finite(loss).backward()
    norm = clip(torch.optim.Adam(model.parameters()), clip_norm=1.0)
    assert norm.is_meta and norm.dim() == 0
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()
