"""What a model costs: parameters by part, floating-point operations. Needs no device."""

from __future__ import annotations

from typing import NamedTuple

from hpcm_scale.compute.flops import TRAINING_FACTOR
from hpcm_scale.config.schema import ModelConfig
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.shapes import (
    forward_flops_per_image,
    kmac_per_pixel,
    on_meta,
    parameter_count,
    parameters_by_part,
)


def training_flops_per_image(model: HPCM, side: int) -> int:
    """Model FLOPs of training on one side×side crop: forward and backward."""
    return TRAINING_FACTOR * forward_flops_per_image(model, side)


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
