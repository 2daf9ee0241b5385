"""Parameters of a model: counts and FLOPs on the meta device, sharded access, learning rates by width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Size, nn

from hpcm_scale.compute.tracker import forward_flops
from hpcm_scale.config.schema import ModelConfig
from hpcm_scale.model.hpcm import HPCM

# Parameters that DeepSpeed's ZeRO-3 has sharded: each process holds a part, and the tensor itself is empty.


def shape_of(parameter: nn.Parameter) -> Size:
    """The shape of a parameter, sharded or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def whole(parameter: nn.Parameter) -> Iterator[None]:
    """Within, a parameter is whole and may be changed, in all processes alike; a sharded one is sharded again after."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters  # only here: slow to import, and there already

    with GatheredParameters([parameter], modifier_rank=0):
        yield


# What a model's shapes tell, without its memory: parameters and floating-point operations.


_PARTS: dict[str, tuple[str, ...]] = {
    "g_a": ("g_a",),
    "g_s": ("g_s",),
    "hyper": ("h_a", "h_s", "hyper_prior"),
    "context": ("context",),
}


def on_meta(config: ModelConfig) -> HPCM:
    """The model without memory: shapes only."""
    with torch.device("meta"):
        return HPCM(config)


def parameter_count(model: nn.Module) -> int:
    """All parameters of a model or of a part of it."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_by_part(model: HPCM) -> dict[str, int]:
    """Parameter counts of g_a, g_s, hyper (h_a, h_s and the prior of z) and context, in that order."""
    return {part: sum(parameter_count(model.get_submodule(name)) for name in names) for part, names in _PARTS.items()}


def forward_flops_per_image(model: HPCM, side: int) -> int:
    """FLOPs (2 per multiply-accumulate) of coding one side×side image; `model` on `meta`."""
    return forward_flops(model, torch.empty(1, 3, side, side, device="meta"))


def kmac_per_pixel(flops: int, side: int) -> float:
    """Thousands of multiply-accumulates per pixel, from the FLOPs of a side×side image."""
    return flops / 2 / side**2 / 1e3


# Maximal update parametrisation (muP; Tensor Programs V, arXiv 2203.03466, table 3, for Adam).
#
# Weights that sum over more inputs in a wider network start smaller and learn at lower rates, so that every layer's
# outputs change by as much in a step at any width, and the best learning rate of a small network is that of a large
# one. What is here already follows it at the start, but for the last layer: weights of variance 1/inputs, heads of one
# size.


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
