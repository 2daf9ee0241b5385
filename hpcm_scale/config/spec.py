"""What follows from a checked configuration and a number of processes, worked out once."""

from __future__ import annotations

import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from hpcm_scale.config.checks import micro_batch_size, side_multiple
from hpcm_scale.config.deepspeed import deepspeed_dictionary
from hpcm_scale.config.schema import Config, RunConfig, ScheduleConfig
from hpcm_scale.errors import UserError

_NAME_BYTES = 255
_PATH_BYTES = 4096 - 512
"""The longest name that file systems take, and the longest path, less the names of the files in a run folder."""
_BESIDE = ".sbatch"
"""The longest ending of the files beside a run folder, which have its name."""


class Phase(NamedTuple):
    """Optimizer steps with crops of one size.

    All steps train on the same number of pixels, and so do all forward passes: where the crop grows, batch and
    micro-batch shrink, and the number of forward passes per step stays.
    """

    first_step: int
    """Steps done when it begins."""
    last_step: int
    """Steps done when it ends."""
    crop: int
    """Side, pixels."""
    batch_size: int
    """Images per step over all processes and accumulation rounds."""
    first_image: int
    """Global index of its first image: images trained on when it begins."""
    micro_batch_size: int
    """Images per process and forward pass."""


@dataclass(frozen=True)
class RunSpec:
    """The numbers of one run on `world_size` processes."""

    world_size: int
    folder: Path
    """The run folder: `run.dir`, or runs/<model>."""
    phases: tuple[Phase, ...]
    """In order, from step 0 to train.steps; those without a step are left out."""
    accumulation: int
    """Forward passes per process and optimizer step, the same in all phases."""
    side_multiple: int
    """Sides of the model's input are multiples of this, pixels."""
    deepspeed: dict[str, Any]
    """DeepSpeed's configuration."""

    @classmethod
    def of(cls, config: Config, world_size: int) -> RunSpec:
        """The numbers of a checked configuration. Raises UserError if the name of the run folder is too long."""
        images = micro_batch_size(config.train, world_size)
        rounds = config.train.batch_size // (world_size * images)
        return cls(
            world_size=world_size,
            folder=run_directory(config.run, config.model.name),
            phases=tuple(_phases(config, images)),
            accumulation=rounds,
            side_multiple=side_multiple(config.model),
            deepspeed=deepspeed_dictionary(config.engine, config.train, images, rounds),
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole schedule."""
        return self.phases[-1].last_step

    @property
    def images(self) -> int:
        """Images of the whole run."""
        return self.images_at(self.steps)

    @property
    def micro_batch_size(self) -> int:
        """Images per process and forward pass in the first phase."""
        return self.phases[0].micro_batch_size

    def phase_at(self, step: int) -> Phase:
        """The phase of optimizer step `step` (from 0); of train.steps itself, the last one."""
        return self.phases[bisect_right(self.phases, step, key=lambda phase: phase.first_step) - 1]

    def images_at(self, step: int) -> int:
        """Images trained on before optimizer step `step` (from 0)."""
        phase = self.phase_at(step)
        return phase.first_image + (step - phase.first_step) * phase.batch_size

    @property
    def batch(self) -> str:
        """What a step trains on, in words."""
        first, *later = self.phases
        if not later:
            return f"{first.batch_size} images"
        then = ", ".join(f"{phase.batch_size} of {phase.crop}² from step {phase.first_step:,} on" for phase in later)
        return f"{first.batch_size} crops of {first.crop}² ({then})"


def _phases(config: Config, micro_batch_size: int) -> Sequence[Phase]:
    crop, train = config.data.crop, config.train
    starts = crop_starts(config.schedule, train.steps)
    edges = [min(step, train.steps) for step in (0, *starts, train.steps)]
    found, images = [], 0
    for side, (first, last) in zip([crop, *config.schedule.crops], pairwise(edges), strict=False):
        batch, micro = (number * crop**2 // side**2 for number in (train.batch_size, micro_batch_size))
        if first < last:
            found.append(Phase(first, last, side, batch, images, micro))
        images += (last - first) * batch
    return found


def crop_starts(schedule: ScheduleConfig, steps: int) -> list[int]:
    """Steps done when each of `schedule.crops` begins; fractions count as those of `schedule.boundaries` do."""
    boundaries = schedule.crop_boundaries
    if boundaries and boundaries[-1] >= 1:
        return [math.ceil(boundary) for boundary in boundaries]
    return [bisect_left(range(steps), boundary, key=lambda step: step / steps) for boundary in boundaries]


def run_directory(run: RunConfig, model: str) -> Path:
    """`run.dir`, or runs/<model> if it is unset. Raises UserError if that is longer than file systems allow."""
    folder = Path(run.dir or f"runs/{model}")
    longest = max(len(os.fsencode(name)) for name in (*folder.parts, folder.name + _BESIDE))
    if longest > _NAME_BYTES or len(os.fsencode(folder.absolute())) > _PATH_BYTES:
        raise UserError(
            "run-dir-too-long",
            "run.dir",
            f"run.dir={str(folder)[:40]}… is too long; choose one with a name of at most {_NAME_BYTES - len(_BESIDE)} "
            f"bytes and a whole path of at most {_PATH_BYTES}",
        )
    return folder
