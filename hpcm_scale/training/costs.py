"""What a model costs: parameters by part, floating-point operations. Needs no device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch

from hpcm_scale.compute.tracker import TRAINING_FACTOR, forward_flops
from hpcm_scale.config.phases import phases
from hpcm_scale.config.schema import Config, ModelConfig
from hpcm_scale.machine.codec import MachineCodec
from hpcm_scale.machine.extractor import TokenExtractor
from hpcm_scale.machine.pre_editor import PreEditor
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.parameters import (
    forward_flops_per_image,
    kmac_per_pixel,
    on_meta,
    parameter_count,
    parameters_by_part,
)


def training_flops_per_image(model: HPCM, side: int) -> int:
    """Model FLOPs of training on one side×side crop: forward and backward."""
    return TRAINING_FACTOR * forward_flops_per_image(model, side)


class TaskCosts(NamedTuple):
    """What is trained, and what it costs."""

    parameters: int
    """Of those that are trained."""
    parameters_by_part: dict[str, int]
    training_flops_per_image: int
    """Model FLOPs of a crop, forward and backward."""


def task_costs(
    config: Config, receivers: Mapping[str, TokenExtractor] | None = None, crop: int | None = None
) -> TaskCosts:
    """The costs of what a configuration trains, for `receivers` where there are any; the codec takes no memory for it.

    `crop`: side of a later phase's crops, pixels; unset: data.crop.

    Receivers see the original without gradients and the decoded image with, and have none of their own: of forward
    passes that is three, too; eigenvalues are not counted. Through a frozen codec gradients go only to its input: two.
    """
    shapes, machine, side = on_meta(config.model), config.machine, crop or config.data.crop
    codec = forward_flops_per_image(shapes, side)
    parts, forward_passes = parameters_by_part(shapes), TRAINING_FACTOR * codec
    if machine.freeze_codec:
        parts, forward_passes = {}, (TRAINING_FACTOR - 1) * codec
    on_meta_too = {name: copy.deepcopy(receiver).to("meta") for name, receiver in (receivers or {}).items()}
    x = torch.empty(1, 3, side, side, device="meta")
    flops = {name: forward_flops(receiver, x) for name, receiver in on_meta_too.items()}
    if machine.edit:
        seen = on_meta_too.get(machine.pre_editor.tokens)
        with torch.device("meta"):
            pre_editor = PreEditor(machine.pre_editor, seen and seen.token_channels, config.model.rate.levels)
        whole = forward_flops(MachineCodec(shapes, pre_editor, seen), x)
        flops["pre_editor"] = whole - codec - flops.get(machine.pre_editor.tokens, 0)
        parts["pre_editor"] = parameter_count(pre_editor)
    return TaskCosts(sum(parts.values()), parts, forward_passes + TRAINING_FACTOR * sum(flops.values()))


def costs_by_phase(config: Config, receivers: Mapping[str, TokenExtractor] | None = None) -> dict[int, TaskCosts]:
    """The costs in each phase of crops, by the global index of its first image."""
    return {phase.first_image: task_costs(config, receivers, phase.crop) for phase in phases(config)}


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
