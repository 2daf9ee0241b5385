"""The learning rate as a function of the step, nothing else: a resumed run needs no state for it."""

from __future__ import annotations

from bisect import bisect_right

from hpcm_scale.config.schema import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) in a run of `steps`."""
    boundaries = schedule.boundaries
    fractions = bool(boundaries) and boundaries[-1] <= 1
    position = step / steps if fractions else step
    factor = schedule.factors[bisect_right(boundaries, position)]
    warmup = min(1.0, (step + 1) / schedule.warmup) if schedule.warmup else 1.0
    return schedule.learning_rate * factor * warmup
