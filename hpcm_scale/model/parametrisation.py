"""Maximal update parametrisation (muP; Tensor Programs V, arXiv 2203.03466, table 3, for Adam).

Weights that sum over more inputs in a wider network start smaller and learn at lower rates, so that every layer's
outputs change by as much in a step at any width, and the best learning rate of a small network is that of a large one.
What is here already follows it at the start, but for the last layer: weights of variance 1/inputs, heads of one size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.shapes import on_meta
from hpcm_scale.model.sharding import whole

BASE = {"channels": [8, 16, 32], "latent_channels": 24, "hyper_latent_channels": 24, "hyper_channels": 24}
"""Widths at which all learning rates are `schedule.learning_rate`: those of the preset 450k."""
LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def fan_in(layer: nn.Module) -> int:
    """How many products an output of a convolution, transposed convolution or linear layer sums up."""
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.weight.shape[0] // layer.groups * layer.weight[0, 0].numel() // (layer.stride[0] * layer.stride[1])
    return layer.weight[0].numel()


def widening(codec: HPCM) -> dict[str, float]:
    """By name of a layer with weights: its inputs over those that it has in a network of the base's widths."""
    ratio = min(codec.config.partial_ratio, *BASE["channels"])  # a part of the narrowest width is a channel at least
    base = dict(on_meta(replace(codec.config, **BASE, partial_ratio=ratio)).named_modules())
    ours = on_meta(codec.config).named_modules()  # the codec's own weights may be sharded
    return {name: fan_in(layer) / fan_in(base[name]) for name, layer in ours if isinstance(layer, LAYERS)}


@torch.no_grad()
def parametrise(codec: HPCM) -> None:
    """Give the weights of a new codec the start and, as their `learning_rate_factor`, the rates of its width.

    Weights of layers that are widened r-fold have the rate 1/r; biases, channel scales, depthwise convolutions and
    others whose sums do not grow have 1. The last layer, whose outputs are few however wide the network, starts with
    1/√r of its weights, besides.
    """
    ratios = widening(codec)
    layers = dict(codec.named_modules())
    for name, ratio in ratios.items():
        layers[name].weight.learning_rate_factor = 1 / ratio
    last = f"g_s.{len(codec.g_s) - 1}"
    with whole(layers[last].weight):
        layers[last].weight.mul_(ratios[last] ** -0.5)


def learning_rate_factor(parameter: nn.Parameter) -> float:
    """What the learning rate of a parameter is multiplied by; 1 unless `parametrise` has said otherwise."""
    return getattr(parameter, "learning_rate_factor", 1.0)
