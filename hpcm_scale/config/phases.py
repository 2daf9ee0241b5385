"""Phases of a run: crops may change while it trains, and the batch with them, so that every step costs the same.

All steps train on as many pixels, and so do all forward passes: where the crop grows, batch and micro-batch shrink
alike, and the number of forward passes per step stays. Global image indices count on through all phases.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from itertools import pairwise
from typing import NamedTuple

from hpcm_scale.config.schema import Config
from hpcm_scale.errors import UserError


class Phase(NamedTuple):
    """Optimizer steps with crops of one size."""

    first_step: int
    """Steps done when it begins …"""
    last_step: int
    """… and when it ends."""
    crop: int
    """Side, pixels."""
    batch_size: int
    """Images per step over all processes and accumulation rounds."""
    first_image: int
    """Global index of its first image: images trained on when it begins."""


def phases(config: Config) -> list[Phase]:
    """The phases of a checked configuration, in order, from step 0 to train.steps; without those that have no step."""
    crop, steps = config.data.crop, config.train.steps
    edges = [min(step, steps) for step in (0, *crop_starts(config), steps)]
    found, images = [], 0
    for side, (first, last) in zip([crop, *config.schedule.crops], pairwise(edges), strict=False):
        batch_size = config.train.batch_size * crop**2 // side**2
        if first < last:
            found.append(Phase(first, last, side, batch_size, images))
        images += (last - first) * batch_size
    return found


def crop_starts(config: Config) -> list[int]:
    """Steps done when each of `schedule.crops` begins; fractions count as those of `schedule.boundaries` do."""
    boundaries, steps = config.schedule.crop_boundaries, config.train.steps
    if boundaries and boundaries[-1] >= 1:
        return [math.ceil(boundary) for boundary in boundaries]
    return [bisect_left(range(steps), boundary, key=lambda step: step / steps) for boundary in boundaries]


def phase_at(config: Config, step: int) -> Phase:
    """The phase that optimizer step `step` (from 0) is in; of train.steps itself, the last one."""
    found = phases(config)
    return found[bisect_right(found, step, key=lambda phase: phase.first_step) - 1]


def images_at(config: Config, step: int) -> int:
    """Images trained on before optimizer step `step` (from 0)."""
    phase = phase_at(config, step)
    return phase.first_image + (step - phase.first_step) * phase.batch_size


def described(config: Config) -> str:
    """What a step trains on, in words."""
    first, *later = phases(config)
    if not later:
        return f"{first.batch_size} images"
    then = ", ".join(f"{phase.batch_size} of {phase.crop}² from step {phase.first_step:,} on" for phase in later)
    return f"{first.batch_size} crops of {first.crop}² ({then})"


def check_crops(config: Config, multiple: int, micro_batch_size: int, world_size: int) -> None:
    """Raise UserError for phases that cannot be trained.

    `multiple`: what the sides of crops are multiples of; `micro_batch_size`: images per process and forward pass of
    the first phase.
    """
    crops, boundaries, crop = config.schedule.crops, config.schedule.crop_boundaries, config.data.crop
    if len(crops) != len(boundaries):
        raise UserError(
            f"schedule.crops has {len(crops)} entries and schedule.crop_boundaries {len(boundaries)}; give one "
            "boundary for each crop"
        )
    if sorted(boundaries) != list(boundaries):
        raise UserError(f"schedule.crop_boundaries={boundaries} must rise")
    if boundaries and boundaries[0] < 1 <= boundaries[-1]:
        raise UserError(
            f"schedule.crop_boundaries={boundaries} mixes fractions (< 1) and steps (≥ 1); use one of the two"
        )
    unfit = [side for side in crops if side < multiple or side % multiple]
    if unfit:
        mend = max(multiple, round(unfit[0] / multiple) * multiple)
        raise UserError(
            f"schedule.crops={crops} does not fit model={config.model.name}, whose inputs are multiples of {multiple} "
            f"pixels; use {mend} instead of {unfit[0]}"
        )
    unit = math.lcm(*(side**2 // math.gcd(side**2, crop**2) for side in crops))
    if micro_batch_size % unit:
        near = max(unit, round(micro_batch_size / unit) * unit)
        accumulating = config.train.micro_batch_size is not None
        key, value = ("train.micro_batch_size", near) if accumulating else ("train.batch_size", near * world_size)
        raise UserError(
            f"schedule.crops={crops} cannot replace the {micro_batch_size} crops of {crop}² of a forward pass by as "
            f"many pixels, which takes a multiple of {unit}; use {key}={value}"
        )
