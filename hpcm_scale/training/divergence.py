"""Detection of steps that diverge: a non-finite loss or gradient, or a loss spike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

WINDOW = 100
"""Number of past losses that a new one is compared with."""
MIN_LOSSES = 20
"""With fewer past losses there are no spikes."""


class Diverged(Exception):
    """A step after which the run goes back to the last checkpoint; raised on all ranks."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step = step
        self.reason = reason


class Divergence(NamedTuple):
    """A step for which a run was rolled back."""

    step: int
    reason: str
    first: int
    """First global index of the images that are skipped from then on."""
    last: int
    """Last global index of these images."""


def images_to_skip(
    step: int, checkpoint: int, before: Sequence[Divergence], images_at: Callable[[int], int]
) -> tuple[int, int]:
    """First and last global index of the images to skip after a rollback to `checkpoint`.

    These are the images of the step that diverged, and, with every rollback to the same checkpoint, those of twice as
    many steps before it, down to the checkpoint. `images_at` gives the number of images before a step.
    """
    again = sum(divergence.step > checkpoint for divergence in before)
    return images_at(max(checkpoint, step - 2**again)), images_at(step) - 1


class LossHistory:
    """Finite losses of the last steps."""

    def __init__(self, losses: list[float] | None = None) -> None:
        self.losses = list(losses or [])

    def verdict(self, loss: float, spike: float | None) -> str:
        """Why the loss of a step diverges, "" if it does not; `spike` is `train.loss_spike_factor`."""
        if not math.isfinite(loss):
            return "its loss is not finite"
        if spike is not None and len(self.losses) >= MIN_LOSSES:
            usual = median(self.losses)
            if loss > spike * usual > 0:
                return f"its loss of {loss:.4g} is {loss / usual:.3g} times the usual {usual:.4g}"
        return ""

    def add(self, loss: float) -> None:
        """Add the loss of an applied step."""
        self.losses = [*self.losses[1 - WINDOW :], loss]
