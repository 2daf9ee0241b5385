"""The learning rate as a function of the step, nothing else: a resumed run needs no state for it."""

from __future__ import annotations

from bisect import bisect_right
from math import sqrt

from hpcm_scale.config.schema import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) in a run of `steps`.

    The decay at the end is 1 − √progress, the best of those compared in arXiv 2405.18392, section 4.
    """
    boundaries = schedule.boundaries
    fractions = bool(boundaries) and boundaries[-1] <= 1
    position = step / steps if fractions else step
    factor = schedule.factors[bisect_right(boundaries, position)]
    warmup = min(1.0, (step + 1) / schedule.warmup) if schedule.warmup else 1.0
    start = decay_start(schedule, steps)
    decay = 1 - sqrt((step - start) / (steps - start)) if start < step < steps else 1.0
    return schedule.learning_rate * factor * warmup * decay


def decay_start(schedule: ScheduleConfig, steps: int) -> float:
    """The step at which the decay at the end of a run of `steps` begins; `steps` where there is none."""
    return steps - (schedule.decay * steps if schedule.decay <= 1 else schedule.decay)
