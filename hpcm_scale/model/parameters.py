"""Parameters of a model: counts and FLOPs on the meta device, access under ZeRO-3, matrices, muP learning rates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod, sqrt
from typing import NamedTuple

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
    """Number of parameters of a module, also on meta or sharded by ZeRO-3."""
    return sum(prod(shape_of(parameter)) for parameter in model.parameters())


def parameters_by_part(model: HPCM) -> dict[str, int]:
    """Number of parameters of g_a, g_s, hyper (h_a, h_s and the prior of z) and context, in that order."""
    return {part: sum(parameter_count(model.get_submodule(name)) for name in names) for part, names in _PARTS.items()}


_FLOPS: dict[tuple[str, int], int] = {}
"""Results of `forward_flops_per_image`, by configuration and side: counting takes as long as a step of `nano`."""


def forward_flops_per_image(model: HPCM, side: int) -> int:
    """FLOPs (2 per multiply-accumulate) of a forward pass of one side×side image; `model` on the meta device."""
    key = repr(model.config), side
    if key not in _FLOPS:
        _FLOPS[key] = forward_flops(model, torch.empty(1, 3, side, side, device="meta"))
    return _FLOPS[key]


def kmac_per_pixel(flops: int, side: int) -> float:
    """Thousands of multiply-accumulates per pixel, from the FLOPs of a side×side image."""
    return flops / 2 / side**2 / 1e3


# Matrices: the parameters that optimizers may treat as linear maps.

Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
_COLOURS = 3


class Matrix(NamedTuple):
    """A weight as a matrix (outputs, inputs); of a convolution (outputs, inputs·k·k)."""

    shape: tuple[int, ...]
    """Of the weight."""
    transposed: bool = False
    """Whether the weight is (inputs, outputs, k, k), as that of a transposed convolution, not (outputs, inputs, …)."""

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return self.shape[1 if self.transposed else 0]

    @property
    def columns(self) -> int:
        """Number of inputs, of a convolution times k·k."""
        return self.size // self.rows

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    def of(self, weight: Tensor) -> Tensor:
        """The matrix (rows, columns) of a flattened weight (n,): a view if possible."""
        weight = weight.view(self.shape)
        return (weight.transpose(0, 1) if self.transposed else weight).flatten(1)

    def flat(self, matrix: Tensor) -> Tensor:
        """The inverse of `of`."""
        if not self.transposed:
            return matrix.reshape(-1)
        inputs, outputs, *kernel = self.shape
        return matrix.view(outputs, inputs, *kernel).transpose(0, 1).reshape(-1)


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """The weights of a model that are matrices, by name; also of a model that ZeRO-3 shards.

    Those of convolutions and linear layers, except depthwise ones, vectors, and layers from or to the three colours,
    whose rows or columns are no features of the network.
    """
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Layer) and getattr(layer, "groups", 1) == 1:
            matrix = _matrix(layer)
            ends = shape_of(layer.weight)[:2]
            if min(matrix.rows, matrix.columns) > 1 and (ends[0] == _COLOURS) == (ends[1] == _COLOURS):
                found[f"{name}.weight" if name else "weight"] = matrix
    return found


def _matrix(layer: Layer) -> Matrix:
    return Matrix(tuple(shape_of(layer.weight)), isinstance(layer, nn.ConvTranspose2d))


# Maximal update parametrisation (muP; Tensor Programs V, arXiv 2203.03466, table 3, for Adam).
#
# Weights with more inputs in a wider network start smaller and have lower learning rates, so that the outputs of every
# layer change by as much per step at any width, and the best learning rate does not depend on width. The default
# initialization (weights of variance 1/inputs, heads of one size) follows muP in all layers but the last.
#
# The factor of the rate depends on the update. A layer's outputs change by as much at any width if the spectral norm of
# its weights changes in proportion to √(outputs/inputs) (arXiv 2310.17813, condition 1).
# - Adam and SOAP: elements of one size, aligned over inputs and outputs, have a spectral norm in proportion to
#   √(outputs·inputs). The factor is inverse to the number of inputs.
# - Muon: all singular values of an update are 0.2·√max(outputs, inputs) (`training.matrix_optimizers`). The factor is
#   proportional to √(outputs / (inputs · max(outputs, inputs))): inverse to the root of the width if both sides grow.


BASE = {
    "channels": [8, 16, 32],
    "latent_channels": 24,
    "hyper_latent_channels": 24,
    "hyper_channels": 24,
    "context_channels": None,
}
"""Widths at which all factors of the learning rate are 1: those of the preset 450k."""


def fan_in(layer: Layer) -> int:
    """Products summed in an output of a convolution, transposed convolution or linear layer."""
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.weight.shape[0] // layer.groups * layer.weight[0, 0].numel() // (layer.stride[0] * layer.stride[1])
    return layer.weight[0].numel()


def _layers(codec: HPCM) -> dict[str, Layer]:
    return {name: layer for name, layer in codec.named_modules() if isinstance(layer, Layer)}


@torch.no_grad()
def parametrise(codec: HPCM) -> None:
    """Apply muP to a new codec: set the factors of its weights' learning rates, and rescale those of the last layer.

    Weights of layers whose fan-in is r times that of the base have the `learning_rate_factor` 1/r; biases, channel
    scales, depthwise convolutions and others with constant fan-in have 1. The `spectral_factor` is that for Muon.
    Initial weights of the last layer, whose number of outputs is constant, are multiplied by 1/√r.
    """
    config, layers = codec.config, _layers(codec)
    ratio = min(config.partial_ratio, *BASE["channels"])  # at least one channel
    base = _layers(on_meta(replace(config, **BASE, partial_ratio=ratio)))
    for name, ours in _layers(on_meta(config)).items():  # weights of `codec` may be sharded
        weight = layers[name].weight
        weight.learning_rate_factor = fan_in(base[name]) / fan_in(ours)  # pyright: ignore[reportAttributeAccessIssue]
        weight.spectral_factor = _spectral_scale(ours) / _spectral_scale(base[name])  # pyright: ignore[reportAttributeAccessIssue]
    last = layers[f"g_s.{len(codec.g_s) - 1}"].weight
    with gathered(last):
        last.mul_(learning_rate_factor(last) ** 0.5)


def learning_rate_factor(parameter: Tensor) -> float:
    """Factor of the learning rate of a parameter for Adam and SOAP, as `parametrise` has set it; 1 by default."""
    return getattr(parameter, "learning_rate_factor", 1.0)


def spectral_factor(parameter: Tensor) -> float:
    """The same for Muon, whose updates have one spectral norm for all matrices of one shape."""
    return getattr(parameter, "spectral_factor", 1.0)


def _spectral_scale(layer: Layer) -> float:
    matrix = _matrix(layer)
    return sqrt(matrix.rows / (matrix.columns * max(matrix.rows, matrix.columns)))
