"""Parameters of a model: counts and FLOPs on the meta device, access under ZeRO-3, muP learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Size, Tensor, nn

from hpcm_scale.compute.tracker import forward_flops
from hpcm_scale.config.schema import ModelConfig
from hpcm_scale.model.hpcm import HPCM

# Under DeepSpeed's ZeRO-3 each process holds a shard of a parameter, and the tensor itself is empty.


def shape_of(parameter: Tensor) -> Size:
    """The full shape of a parameter, sharded or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def gathered(parameter: Tensor) -> Iterator[None]:
    """Gather a parameter in this context, where it may be changed; all processes must make the same change."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters  # slow to import, and loaded already

    with GatheredParameters([parameter], modifier_rank=0):
        yield


# Parameters and FLOPs of a model on the meta device, without memory.


_PARTS: dict[str, tuple[str, ...]] = {
    "g_a": ("g_a",),
    "g_s": ("g_s",),
    "hyper": ("h_a", "h_s", "hyper_prior"),
    "context": ("context",),
}


def on_meta(config: ModelConfig) -> HPCM:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return HPCM(config)


def parameter_count(model: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_by_part(model: HPCM) -> dict[str, int]:
    """Number of parameters of g_a, g_s, hyper (h_a, h_s and the prior of z) and context, in that order."""
    return {part: sum(parameter_count(model.get_submodule(name)) for name in names) for part, names in _PARTS.items()}


def forward_flops_per_image(model: HPCM, side: int) -> int:
    """FLOPs (2 per multiply-accumulate) of a forward pass of one side×side image; `model` on the meta device."""
    return forward_flops(model, torch.empty(1, 3, side, side, device="meta"))


def kmac_per_pixel(flops: int, side: int) -> float:
    """Thousands of multiply-accumulates per pixel, from the FLOPs of a side×side image."""
    return flops / 2 / side**2 / 1e3


# Maximal update parametrisation (muP; Tensor Programs V, arXiv 2203.03466, table 3, for Adam).
#
# Weights with more inputs in a wider network start smaller and have lower learning rates, so that the outputs of every
# layer change by as much per step at any width, and the best learning rate does not depend on width. The default
# initialization (weights of variance 1/inputs, heads of one size) follows muP in all layers but the last.


BASE = {
    "channels": [8, 16, 32],
    "latent_channels": 24,
    "hyper_latent_channels": 24,
    "hyper_channels": 24,
    "context_channels": None,
}
"""Widths at which all factors of the learning rate are 1: those of the preset 450k."""
Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


def fan_in(layer: Layer) -> int:
    """Products summed in an output of a convolution, transposed convolution or linear layer."""
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.weight.shape[0] // layer.groups * layer.weight[0, 0].numel() // (layer.stride[0] * layer.stride[1])
    return layer.weight[0].numel()


def widening(codec: HPCM) -> dict[str, float]:
    """Ratio of the fan-in of each layer to that in a network of the widths `BASE`, by name of the layer."""
    ratio = min(codec.config.partial_ratio, *BASE["channels"])  # at least one channel
    base = _layers(on_meta(replace(codec.config, **BASE, partial_ratio=ratio)))
    ours = _layers(on_meta(codec.config))  # weights of `codec` may be sharded
    return {name: fan_in(layer) / fan_in(base[name]) for name, layer in ours.items()}


def _layers(codec: HPCM) -> dict[str, Layer]:
    return {name: layer for name, layer in codec.named_modules() if isinstance(layer, Layer)}


@torch.no_grad()
def parametrise(codec: HPCM) -> None:
    """Apply muP to a new codec: set `learning_rate_factor` of its weights, and rescale those of the last layer.

    Weights of layers whose fan-in is r times that of the base have the factor 1/r; biases, channel scales, depthwise
    convolutions and others with constant fan-in have 1. Initial weights of the last layer, whose number of outputs is
    constant, are multiplied by 1/√r.
    """
    ratios = widening(codec)
    layers = _layers(codec)
    for name, ratio in ratios.items():
        layers[name].weight.learning_rate_factor = 1 / ratio  # pyright: ignore[reportAttributeAccessIssue]
    last = f"g_s.{len(codec.g_s) - 1}"
    with gathered(layers[last].weight):
        layers[last].weight.mul_(ratios[last] ** -0.5)


def learning_rate_factor(parameter: nn.Parameter) -> float:
    """Factor of the learning rate of a parameter, as `parametrise` has set it; 1 by default."""
    return getattr(parameter, "learning_rate_factor", 1.0)
