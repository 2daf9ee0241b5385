"""FLOPs against counts by hand, and what the factor 3 of a training step rests on."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from hpcm_scale.compute.tracker import TRAINING_FACTOR, forward_flops
from hpcm_scale.config.compose import compose_model
from hpcm_scale.model.hpcm import Noise
from hpcm_scale.model.parameters import on_meta

on_meta_device = functools.partial(torch.empty, device="meta")


class Attention(nn.Module):
    """Attention on its own, 3 heads of 8 channels, 10 queries, 20 keys."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value)


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.forward = function


BY_HAND = {
    # outputs × (inputs per group × kernel) multiply-accumulates, 2 FLOPs each; biases are free
    "conv": (nn.Conv2d(5, 7, 3, padding=1), [(2, 5, 11, 13)], 2 * 2 * 7 * 11 * 13 * 5 * 9),
    "conv, stride 2": (nn.Conv2d(5, 7, 2, stride=2), [(1, 5, 12, 8)], 2 * 7 * 6 * 4 * 5 * 4),
    "depthwise conv": (nn.Conv2d(6, 6, 3, padding=1, groups=6), [(1, 6, 4, 4)], 2 * 6 * 16 * 9),
    "grouped conv": (nn.Conv2d(6, 8, 1, groups=2), [(1, 6, 4, 4)], 2 * 8 * 16 * 3),
    # inputs × (outputs × kernel)
    "transposed conv": (nn.ConvTranspose2d(5, 7, 2, stride=2), [(1, 5, 6, 4)], 2 * 5 * 6 * 4 * 7 * 4),
    "transposed conv, 4×4": (nn.ConvTranspose2d(5, 7, 4, stride=2, padding=1), [(1, 5, 6, 4)], 2 * 5 * 6 * 4 * 7 * 16),
    "linear": (nn.Linear(5, 7), [(3, 4, 5)], 2 * 3 * 4 * 5 * 7),
    "linear of a vector": (nn.Linear(5, 7), [(5,)], 2 * 5 * 7),
    "attention": (Attention(), [(2, 3, 10, 8), (2, 3, 20, 8), (2, 3, 20, 8)], 2 * 2 * 2 * 3 * 10 * 20 * 8),
    "normalisation, activation, sum": (nn.Sequential(nn.LayerNorm(5), nn.GELU()), [(3, 5)], 0),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_forward_by_hand(case):
    module, shapes, expected = BY_HAND[case]
    assert forward_flops(module.to("meta"), *(on_meta_device(shape) for shape in shapes)) == expected


def test_modules_add_up_and_repeat():
    layer = nn.Linear(5, 5).to("meta")
    once = forward_flops(layer, on_meta_device(3, 5))
    assert forward_flops(nn.Sequential(layer, nn.ReLU(), layer), on_meta_device(3, 5)) == 2 * once == 2 * 2 * 3 * 25


UNKNOWN = {
    "bilinear": (nn.Bilinear(4, 8, 3), [(3, 4), (3, 8)]),
    "matrix times vector": (Function(lambda x, y: x @ y), [(3, 4), (4,)]),
    "inner product": (Function(torch.dot), [(4,), (4,)]),
    "distances": (Function(torch.cdist), [(3, 4), (5, 4)]),
    "triangular solution": (Function(lambda x, y: torch.linalg.solve_triangular(x, y, upper=True)), [(4, 4), (4, 2)]),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_product_is_refused_not_counted_as_nothing(case):
    module, shapes = UNKNOWN[case]
    with pytest.raises(ValueError, match="has no FLOP formula"):
        forward_flops(module.to("meta"), *(on_meta_device(shape) for shape in shapes))


def test_only_on_meta():
    """On a CPU, attention would count nothing."""
    with pytest.raises(AssertionError, match="attention"):
        forward_flops(nn.Linear(2, 2), torch.zeros(2, 2))


# torch 2.13's own formula of the backward pass counts the weight gradient of a grouped convolution as if it had
# one group. Right: both gradients cost as much as the forward pass, a product per output, input channel and tap.
def convolution_backward(
    gradient, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, wanted, out_shape=None
) -> int:
    """FLOPs of `aten.convolution_backward` from shapes."""
    return conv_flop_count(x, weight, gradient, transposed=transposed) * (wanted[0] + wanted[1])


def test_the_corrected_backward_formula_by_hand():
    """Depthwise 3×3: torch's own reads 961 times the forward pass, the corrected one 2."""
    layer = nn.Conv2d(960, 960, 3, padding=1, groups=960, device="meta")
    x = on_meta_device(1, 960, 16, 16).requires_grad_()
    forward = forward_flops(layer, x)
    with FlopCounterMode(display=False, custom_mapping=CORRECTED) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * forward
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() > 900 * forward  # if this fails, torch is mended: count its backward pass


CORRECTED = {torch.ops.aten.convolution_backward: convolution_backward}


@pytest.mark.parametrize(("name", "ratio"), [("68m", 1.984), pytest.param("1b", 2.000, marks=pytest.mark.launch)])
def test_backward_is_twice_forward(name, ratio):
    """So a training step is 3 times a forward pass, to 0.6 %."""
    model = on_meta(compose_model(name))
    x = on_meta_device(1, 3, 256, 256)
    noise = Noise(*(on_meta_device(1, *shape) for shape in model.latent_shapes(256, 256)))
    forward = forward_flops(model, x)
    with FlopCounterMode(display=False, custom_mapping=CORRECTED) as counter:
        coded = model(x, noise)
        (coded.x_hat.sum() + coded.bits_y.sum() + coded.bits_z.sum()).backward()
    measured = counter.get_total_flops() / forward - 1
    assert measured == pytest.approx(ratio, abs=0.0006)
    assert abs(TRAINING_FACTOR / (1 + measured) - 1) < 0.006
