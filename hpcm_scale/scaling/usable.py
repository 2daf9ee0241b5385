"""The lines of a run that a curve can be made of, and why others cannot."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpcm_scale.scaling.facts import learning_rates
from hpcm_scale.scaling.runs import Run
from hpcm_scale.scaling.smoothing import smoothed

EVALUATION, TRAINING = "eval/loss", "train/loss"
"""Losses of the weights on images held out, and of training."""
SHORTEST = 20
"""Training lines below which no noise is averaged out."""


class LeftOut(Exception):
    """Why a run cannot be used, to be read after "it is left out"."""


class Lines(NamedTuple):
    """Lines with a finite value of a metric; float64 (n,), ascending in all but the loss."""

    steps: np.ndarray
    pflops: np.ndarray
    images: np.ndarray
    loss: np.ndarray


def usable_lines(run: Run, metric: str) -> Lines:
    """The lines of a metric, `TRAINING` or another. Raises LeftOut when there is no curve in them."""
    records = run.records
    rows = records.rows(metric)
    if not rows.size and records.nulls[metric]:
        raise LeftOut(f"its {metric} was never finite")
    if not rows.size:
        missing = {EVALUATION: "it has no evaluation yet", TRAINING: "it has no training line"}
        raise LeftOut(missing.get(metric, f"it has no {metric}"))
    if metric == TRAINING and rows.size < SHORTEST:
        lines = "1 training line is" if rows.size == 1 else f"{rows.size} training lines are"
        every = (run.config.get("log") or {}).get("every")
        often = "" if every == 1 else ", or with a lower log.every" + (f" (it is {every})" if every else "")
        raise LeftOut(f"{lines} too few to smooth; {SHORTEST} are needed: train longer{often}")
    lines = Lines(*(records.column(key)[rows] for key in ("step", "compute/pflops", "train/images", metric)))
    stuck = np.flatnonzero(~((np.diff(lines.pflops) > 0) & (np.diff(lines.images) > 0)))
    if stuck.size:
        before, after = lines.steps[stuck[0] : stuck[0] + 2]
        raise LeftOut(
            f"its compute or images do not grow from step {before:.0f} to {after:.0f}; are two journals in one?"
        )
    if not (lines.pflops[0] > 0 and lines.images[0] > 0 and lines.loss.min() > 0):
        raise LeftOut("its compute, images and loss are not all above zero")
    return lines


def end(run: Run, metric: str, step: float) -> float | None:
    """An evaluation's `metric` at `step`, or the end of the smoothed curve of training lines up to it."""
    rows = run.records.rows(metric)
    steps, pflops, values = (run.records.column(key)[rows] for key in ("step", "compute/pflops", metric))
    if metric.startswith("eval/"):
        at = np.flatnonzero(steps == step)
        return float(values[at[0]]) if at.size else None
    so_far = steps <= step
    if not so_far.any():
        return None
    return float(smoothed(pflops[so_far], values[so_far], learning_rates(run, steps[so_far]))[-1])


def passed_over(run: Run, metric: str) -> list[str]:
    """One sentence for each kind of line that a run in use has, and its curve does not."""
    sentences = []
    if repeated := run.records.repeated(metric):
        sentences.append(f"{run.name}: {_count(repeated)} the step of a later line, which is used instead")
    if nulls := run.records.nulls[metric]:
        sentences.append(f"{run.name}: {_count(nulls)} no finite {metric} and {'is' if nulls == 1 else 'are'} left out")
    return sentences


def _count(lines: int) -> str:
    return f"{lines:,} line{' has' if lines == 1 else 's have'}"
