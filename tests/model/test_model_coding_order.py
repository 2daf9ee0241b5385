"""The coding order: every position once, nothing seen before it is decoded, fast equals slow."""

from __future__ import annotations

import pytest
import slow_coding
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_values import join
from small_models import small

from hpcm_scale.config.schema import Fusion, HyperPlacement
from hpcm_scale.model.coding_order import CodingOrder
from hpcm_scale.model.context import ContextModel
from hpcm_scale.model.hpcm import HPCM, Noise

STEPS = 11


def lively(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights large enough that every input matters, float64."""
    torch.manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def fast_steps(channels: int, height: int, width: int) -> torch.Tensor:
    order = CodingOrder()
    packed = order.split(torch.zeros(1, channels, height, width))
    return join(order, [torch.full_like(values, step) for step, values in enumerate(packed)])[0]


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_every_position_is_coded_once_and_when_it_should_be(per_group, rows, cols):
    channels, height, width = 8 * per_group, 8 * rows, 8 * cols
    slow = slow_coding.step_map(channels, height, width)
    assert slow.min() == 0 and slow.max() == STEPS - 1
    assert torch.equal(fast_steps(channels, height, width), slow.float())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_split_and_join_are_inverse(batch, per_group, rows, cols, seed):
    shape = (batch, 8 * per_group, 8 * rows, 8 * cols)
    y = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    order = CodingOrder()
    packed = order.split(y)
    assert len(packed) == STEPS
    assert sum(values.numel() for values in packed) == y.numel()
    assert torch.equal(join(order, packed), y)


@pytest.mark.parametrize("placement", list(HyperPlacement))
@pytest.mark.parametrize("fusion", list(Fusion))
@pytest.mark.parametrize("height, width", [(16, 16), (32, 16)])
def test_the_fast_traversal_equals_the_slow_one(placement, fusion, height, width):
    model = lively(ContextModel(small(fusion, placement)))
    y = 3 * torch.randn(1, 16, height, width, dtype=torch.float64)
    hyper = torch.randn(1, 32, height, width, dtype=torch.float64)
    values = model.order.split(y)
    with torch.no_grad():
        fast = model.traverse_packed(hyper, lambda step, _, means: (values[step] - means).round() + means)
        slow = slow_coding.traverse(model, hyper[0], y[0], placement == HyperPlacement.upstream)
    torch.testing.assert_close(fast[0], slow, rtol=0, atol=1e-9)


@pytest.mark.parametrize("fusion", list(Fusion))
@pytest.mark.parametrize("step", range(STEPS))
def test_no_step_sees_a_later_one(fusion, step):
    """Perturb what is decoded at a step: nothing decoded earlier moves, and something later does."""
    model = lively(ContextModel(small(fusion)))
    hyper = torch.randn(1, 32, 16, 16, dtype=torch.float64)
    symbols = [values.round() for values in model.order.split(torch.randn(1, 16, 16, 16).double() * 3)]

    def decode(symbols):
        seen = []

        def code(number, scales, means):
            seen.append(torch.cat([scales, means]))
            return symbols[number] + means

        with torch.no_grad():
            model.traverse_packed(hyper, code)
        return seen

    before = decode(symbols)
    symbols[step] = symbols[step].clone()
    symbols[step].view(-1)[7] += 5
    after = decode(symbols)
    for number in range(STEPS):
        if number <= step:
            assert torch.equal(before[number], after[number])
    if step < STEPS - 1:
        assert not torch.equal(before[step + 1], after[step + 1])


def test_training_encoding_and_decoding_reach_the_same_latent_to_the_bit():
    torch.manual_seed(0)
    model = HPCM(small()).eval()
    x = torch.rand(2, 3, 256, 256)
    with torch.no_grad():
        y = model.g_a(x)
        z_hat, _ = model.hyper_prior(model.h_a(y), None, model.rate)
        hyper = model.h_s(z_hat)
        values, symbols = model.context.order.split(y), []

        def encode(step, _, means):
            symbols.append((values[step] - means).round())
            return symbols[-1] + means

        encoded = model.context.traverse_packed(hyper, encode)
        decoded = model.context.traverse_packed(hyper, lambda step, _, means: symbols[step] + means)
        assert torch.equal(encoded, decoded)
        expected = model.g_s(decoded)
        noise = Noise(*(torch.rand(2, *shape) - 0.5 for shape in model.latent_shapes(256, 256)))
        assert torch.equal(model(x, noise).x_hat, expected)
        assert torch.equal(model(x).x_hat, expected)
