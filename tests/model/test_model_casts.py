"""Weights of 1×1 convolutions are cast to bf16 once a step, and nothing else changes by it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from seeded_models import small_1b
from small_models import images, loss_and_gradients, small, with_few_shapes
from torch._subclasses.fake_tensor import FakeTensorMode

from hpcm_scale.compute.tracker import Launches, PeakMemory
from hpcm_scale.config.schema import Checkpointing, Precision
from hpcm_scale.model import hpcm, layers
from hpcm_scale.model.arithmetic import Kernels, product, use_kernels
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.layers import cast_once, set_arithmetic


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """However narrow, as on a GPU."""
    monkeypatch.setattr(layers, "product_is_faster", lambda x, layer: layers.channels_last(x))


def build(config=None, **options) -> HPCM:
    torch.manual_seed(0)
    return HPCM(config or small(), **{"precision": Precision.bf16, **options})


@pytest.mark.parametrize("checkpoint", Checkpointing)
@pytest.mark.parametrize("config", [small(), small_1b()], ids=["68m", "1b"])
def test_a_step_is_the_same_to_the_bit(config, checkpoint, monkeypatch):
    model, x = build(config, activation_checkpointing=checkpoint), images(1, 256, 256)
    loss, gradients = loss_and_gradients(model, x)
    monkeypatch.setattr(hpcm, "cast_once", lambda layers, x: nullcontext())
    expected, at_each_use = loss_and_gradients(model, x)
    assert loss == expected
    assert {name for name, gradient in gradients.items() if not torch.equal(at_each_use[name], gradient)} == set()


@pytest.mark.parametrize("checkpoint", Checkpointing)
def test_no_cast_outlives_a_step(checkpoint):
    """Neither a whole one, nor a forward pass that fails: the next one sees the weights as they are then."""
    model, x = build(activation_checkpointing=checkpoint), images(1, 256, 256)
    chosen = model._pointwise
    first, _ = loss_and_gradients(model, x)
    assert all(layer.cast is None for layer in chosen)
    with torch.no_grad():
        for layer in chosen:
            layer.weight.data.mul_(1.1)  # as DeepSpeed writes them: behind autograd's back
    second, _ = loss_and_gradients(model, x)
    fresh = HPCM(small(), precision=Precision.bf16, activation_checkpointing=checkpoint)
    fresh.load_state_dict(model.state_dict())
    assert second != first and second == loss_and_gradients(fresh, x)[0]
    with pytest.raises(RuntimeError):
        model(x[:, :2])
    assert all(layer.cast is None for layer in chosen) and list(layers._casts) == []


def test_all_weights_are_cast_together():
    model, x = build(), images(1, 256, 256)
    with Launches() as launches, torch.no_grad():
        model(x)
    assert launches.by_kind["_foreach_copy_"] == 1
    with Launches() as launches, torch.no_grad():
        build(precision=Precision.fp32)(x)
        model(x.contiguous())
    assert launches.by_kind["_foreach_copy_"] == 0


def test_layers_that_share_no_cast():
    """Those with fp32 results, and all under ZeRO-3, whose weights are there only while their layer is used."""
    model, x = build(), images(1, 256, 256)
    fp32 = [layer for layer in model.modules() if isinstance(layer, layers.Pointwise) and layer.fp32]
    chosen = model._pointwise
    with torch.autocast("cpu", torch.bfloat16):
        with cast_once(chosen, x):
            assert all(layer.cast[0].dtype == torch.bfloat16 for layer in chosen)
            assert fp32 and all(layer.cast is None for layer in fp32)
        for parameter in model.parameters():
            parameter.ds_id = 0
        with cast_once(chosen, x):
            assert all(layer.cast is None for layer in chosen)


def test_an_estimate_counts_the_copy():
    """2 bytes for each weight and bias of a 1×1 convolution."""
    with FakeTensorMode():
        model, x = build(), torch.empty(1, 3, 256, 256).to(memory_format=torch.channels_last)
        chosen = model._pointwise
        with (
            torch.autocast("cpu", torch.bfloat16),
            PeakMemory() as memory,
            use_kernels(Kernels.cuda),
            cast_once(chosen, x),
        ):
            pass
    assert memory.peak == 2 * sum(layer.weight.numel() + layer.bias.numel() for layer in chosen)


def test_frozen_weights_cost_no_gradient():
    x = torch.randn(2, 4, 4, 8, requires_grad=True)
    weight, bias = torch.randn(16, 8, 1, 1), torch.randn(16)
    result = product(x, weight, bias)
    with Launches() as launches:
        result.backward(torch.ones_like(result))
    assert launches.by_kind["mm"] == 1 and launches.by_kind["sum"] == 0
    torch.testing.assert_close(x.grad, weight.flatten(1).sum(dim=0).expand_as(x))


@pytest.mark.launch
def test_a_compiled_region_takes_the_cast():
    """One graph for all steps, with the result of the network that is not compiled."""
    from hpcm_scale.model.compiled import compile_regions

    torch._dynamo.reset()
    model, x = build(with_few_shapes()), images(1, 256, 256)
    expected, gradients = loss_and_gradients(model, x)
    compile_regions(model, backend="aot_eager")
    compiled, of_compiled = loss_and_gradients(model, x)
    assert compiled == pytest.approx(expected, rel=1e-3)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (of_compiled[name] - gradient).abs().max() < 0.02 * (gradient.abs().max() + 0.01 * largest), name
    with torch._dynamo.config.patch(error_on_recompile=True):
        loss_and_gradients(model, images(1, 256, 256, seed=1))
    torch._dynamo.reset()


def test_a_product_is_one_operation_after_zero_3_too(monkeypatch):
    """DeepSpeed's linear multiplies, then adds: other digits than before, and one more launch."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    x, weight, bias = torch.randn(2, 4, 4, 8), torch.randn(6, 8, 1, 1), torch.randn(6)
    expected = product(x, weight, bias)
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    with Launches() as launched:
        result = product(x, weight, bias)
    assert launched.by_kind.total() == 1 and torch.equal(result, expected)


@pytest.mark.parametrize("precision", Precision)
def test_long_sums_are_not_split_and_rounded(precision):
    """By default torch lets cuBLAS add up parts of a sum in bf16 or fp16."""
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = True
    try:
        set_arithmetic(precision)
        assert not matmul.allow_bf16_reduced_precision_reduction
        assert not matmul.allow_fp16_reduced_precision_reduction
    finally:
        set_arithmetic(Precision.fp32)
