"""Costs of a model: parameters by part and FLOPs. Needs no device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from hpcm_scale.compute.tracker import TRAINING_FACTOR
from hpcm_scale.config.schema import MachineConfig, ModelConfig, OptimizerConfig
from hpcm_scale.config.spec import Phase
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.parameters import (
    forward_flops_per_image,
    kmac_per_pixel,
    on_meta,
    parameter_count,
    parameters_by_part,
)
from hpcm_scale.tasks import plugin
from hpcm_scale.training.matrix_optimizers import cost


def training_flops_per_image(model: HPCM, side: int) -> int:
    """Model FLOPs of training on one side×side crop, forward and backward."""
    return TRAINING_FACTOR * forward_flops_per_image(model, side)


class TaskCosts(NamedTuple):
    """Parameters and FLOPs of a training."""

    parameters: int
    """Trained ones only."""
    parameters_by_part: dict[str, int]
    training_flops_per_image: int
    """Model FLOPs of a crop, forward and backward; in `costs_by_phase` with its share of the optimizer's."""
    trained: Sequence[nn.Module]
    """The trained modules, on meta."""


def optimizer_flops(model: nn.Module, optimizer: OptimizerConfig) -> int:
    """FLOPs of an optimizer step: the products of Muon or SOAP, once for each matrix; 0 for Adam.

    A run whose ranks all compute the same updates (ZeRO 0, accelerate) counts them once, as it counts no recomputation.
    """
    return cost(model, optimizer).flops


def task_costs(
    model: ModelConfig, machine: MachineConfig, crop: int, receivers: Mapping[str, nn.Module] | None = None
) -> TaskCosts:
    """The costs of training on crop×crop images, for `receivers` if the target is not human; computed on `meta`."""
    codec = on_meta(model)
    if receivers:
        parts, flops, trained = plugin().training_costs(machine, codec, crop, receivers)
    else:
        parts, flops, trained = parameters_by_part(codec), training_flops_per_image(codec, crop), [codec]
    return TaskCosts(sum(parts.values()), parts, flops, trained)


def costs_by_phase(
    phases: Sequence[Phase],
    model: ModelConfig,
    machine: MachineConfig,
    optimizer: OptimizerConfig,
    receivers: Mapping[str, nn.Module] | None = None,
) -> dict[int, TaskCosts]:
    """The costs in each phase of crops, by the global index of its first image."""
    found = {}
    for phase in phases:
        costs = task_costs(model, machine, phase.crop, receivers)
        per_step = sum(optimizer_flops(module, optimizer) for module in costs.trained)
        flops = costs.training_flops_per_image + per_step // phase.batch_size
        found[phase.first_image] = costs._replace(training_flops_per_image=flops)
    return found


class SizeRow(NamedTuple):
    """One row of the table of sizes."""

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
