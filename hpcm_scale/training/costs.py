"""What a model costs: parameters by part, floating-point operations, memory. Needs no device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpcm_scale.compute.flops import TRAINING_FACTOR, saved_bytes
from hpcm_scale.config.schema import ModelConfig, Precision
from hpcm_scale.model.hpcm import HPCM, Noise
from hpcm_scale.model.shapes import (
    forward_flops_per_image,
    kmac_per_pixel,
    on_meta,
    parameter_count,
    parameters_by_part,
)
from hpcm_scale.objective.rate_distortion import rate_distortion_loss


def training_flops_per_image(model: HPCM, side: int) -> int:
    """Model FLOPs of training on one side×side crop: forward and backward."""
    return TRAINING_FACTOR * forward_flops_per_image(model, side)


def activation_bytes(config: ModelConfig, precision: Precision, side: int, images: int) -> int:
    """Bytes that a forward pass over side×side crops keeps for the backward pass; computed on fake tensors."""
    with FakeTensorMode():  # unlike `meta`, these know autocast
        model = HPCM(config, precision=precision)
        x = torch.empty(images, 3, side, side)
        noise = Noise(*(torch.empty(images, *shape) for shape in model.latent_shapes(side, side)))

        def forward() -> torch.Tensor:
            coded = model(x, noise)
            return rate_distortion_loss(x, coded.x_hat, coded.bits_y, coded.bits_z, 0.013).loss.mean()

        return saved_bytes(forward)


class SizeRow(NamedTuple):
    """One line of the table of sizes."""

    name: str
    parameters: int
    parts: dict[str, int]
    kmac_per_pixel: float
    """Forward pass over a 256×256 image."""
    step_tflop: float
    """Model FLOPs, 1e12, of a training step of 32 crops of 256×256."""


def size_row(config: ModelConfig) -> SizeRow:
    """The costs of one size."""
    model, side, images = on_meta(config), 256, 32
    flops = forward_flops_per_image(model, side)
    return SizeRow(
        config.name,
        parameter_count(model),
        parameters_by_part(model),
        kmac_per_pixel(flops, side),
        TRAINING_FACTOR * flops * images / 1e12,
    )
