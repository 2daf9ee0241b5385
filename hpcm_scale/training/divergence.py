"""Telling a step that would do harm: a loss or gradient that is not finite, or a loss that leaps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

from hpcm_scale.errors import UserError

REMEMBERED = 100
"""Losses of past steps that a new one is compared with."""
LEAST = 20
"""With fewer than so many, no loss is called a leap."""


class Diverged(Exception):
    """A step that asks for going back to the last good checkpoint; raised by all processes alike."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step = step
        self.reason = reason


class Divergence(NamedTuple):
    """A step that a run has been taken back for."""

    step: int
    reason: str
    first: int
    """Global indices of the images that it goes on without: from this one …"""
    last: int
    """… to this one."""


def culprits(
    step: int, checkpoint: int, before: Sequence[Divergence], images_at: Callable[[int], int]
) -> tuple[int, int]:
    """First and last global index of the images to go on without; `images_at`: images trained on before a step.

    They are those of the step itself; where the run has failed before since the same checkpoint, the harm may have
    been done earlier: twice as many steps every time, but none before the checkpoint.
    """
    again = sum(divergence.step > checkpoint for divergence in before)
    return images_at(max(checkpoint, step - 2**again)), images_at(step) - 1


class LossHistory:
    """The losses of the last steps; finite ones only."""

    def __init__(self, losses: list[float] | None = None) -> None:
        self.losses = list(losses or [])

    def verdict(self, loss: float, spike: float | None) -> str:
        """What is wrong with the loss of a step, empty if nothing is; `spike` as `train.loss_spike_factor`."""
        if not math.isfinite(loss):
            return "its loss is not finite"
        if spike is not None and len(self.losses) >= LEAST:
            usual = median(self.losses)
            if loss > spike * usual > 0:
                return f"its loss of {loss:.4g} is {loss / usual:.3g} times the usual {usual:.4g}"
        return ""

    def add(self, loss: float) -> None:
        """Remember the loss of a step that was taken."""
        self.losses = [*self.losses[1 - REMEMBERED :], loss]


def limit_reached(steps: int, step: int) -> UserError:
    """What ends a run that skips and skips."""
    return UserError(
        f"{steps} steps in a row, up to step {step}, had no finite loss and gradient, or a loss that leaps; go on "
        "from an earlier checkpoint with train.on_divergence=rollback, or start anew with a lower "
        "schedule.learning_rate"
    )
