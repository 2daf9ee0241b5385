"""Run metadata, smoothing, and which runs the analysis leaves out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from hpcm_scale.errors import shown
from hpcm_scale.scaling.runs import Run

# What a run's configuration and journal tell about its model, its learning rate and its trunk.


ANNEALED = 0.1
"""A learning rate of at most this part of its peak, once past it, counts as decayed."""


def parameters_by_part(config: dict[str, Any]) -> dict[str, int]:
    """Parameters of g_a, g_s, hyper and context of the model that a run's configuration describes.

    Raises UserError if it describes none that this version knows.
    """
    model = {key: value for key, value in config["model"].items() if key != "name"}
    return dict(_parameters_by_part(json.dumps(model, sort_keys=True)))


@cache
def _parameters_by_part(model: str) -> dict[str, int]:
    from hpcm_scale.config.compose import model_from_dict
    from hpcm_scale.model import parameters

    return parameters.parameters_by_part(parameters.on_meta(model_from_dict(json.loads(model))))


def training_pixels(config: dict[str, Any], steps: np.ndarray, images: np.ndarray) -> np.ndarray | None:
    """float64 (n,): pixels trained on after `steps` with so many `images`; None where no crop is told.

    Where crops change on the way, it is the pixels of a step that stay the same (`config.phases`).
    """
    crop = (config.get("data") or {}).get("crop")
    if not crop:
        return None
    changing = (config.get("schedule") or {}).get("crops")
    return steps * config["train"]["batch_size"] * crop**2 if changing else images * crop**2


def learning_rates(run: Run, steps: np.ndarray) -> np.ndarray:
    """float64 (n,): the rate of the last training line at or before each step; NaN before the first one."""
    rows = run.records.rows("train/learning_rate")
    known, rates = (run.records.column(key)[rows] for key in ("step", "train/learning_rate"))
    return np.append(rates, np.nan)[np.searchsorted(known, steps, side="right") - 1]


def annealed(config: dict[str, Any], steps: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """bool (n,): whether the learning rate has decayed to ANNEALED of its peak or less, after its warm-up.

    A rate that is not known (NaN) has not, nor has any where the configuration does not tell the peak.
    """
    schedule = config.get("schedule") or {}
    peak = schedule.get("learning_rate", 0) * max(schedule.get("factors") or [1])
    return (rates <= ANNEALED * peak * (1 + 1e-9)) & (steps > schedule.get("warmup", 0))


def trunk(run: Run, runs: Sequence[Run]) -> str | None:
    """The name of the run that this one branches off, None for an ordinary one.

    Runs may have been moved since: among `runs` it is the one in the trunk's folder, or else the one whose
    folder has the same name, the nearest to this run; where there is none, the folder's own name.
    """
    path = (run.config.get("run") or {}).get("cooldown_of")
    if path is None:
        return None
    candidates = [other for other in runs if PurePath(path).name in (other.folder.name, PurePath(other.name).name)]

    def far(other: Run) -> tuple[bool, int, str]:
        shared = sum(mine == its for mine, its in zip(run.folder.parts, other.folder.parts, strict=False))
        return str(other.folder) != path, -shared, other.name

    return min(candidates, key=far).name if candidates else shown(PurePath(path).name)


# Noisy losses smoothed over compute, without blurring what a falling learning rate does to them.


DECADES = 0.05
"""Standard deviation of the window in log10(compute): about a tenth of the compute so far."""
RATE = 0.1
"""Change of the learning rate, as a part of its peak, that counts as much as DECADES of compute. The loss falls
within a few percent of a run as the rate decays, or at once where it drops: a window over both sides would lower the
curve before, and raise it after."""
ONE_OPERATION = 1e-15
"""In PFLOPs: the least that compute counts as."""
_PER_WINDOW = 4
"""Bins in a standard deviation of the window."""


def smooth(
    compute: np.ndarray, values: np.ndarray, learning_rate: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Local linear fit of `values` over log10(compute) under a Gaussian window, for drawing.

    Takes one-dimensional float64 arrays, ascending in compute, with the learning rate of each point if known;
    returns compute, ascending, at up to a few hundred places, and the fit there. The cost is linear in the
    number of points.
    """
    compute = _ascending(compute)
    bins, position, fit = _local_lines(compute, values, learning_rate)
    number = np.bincount(bins)
    place = np.bincount(bins, position)[number > 0] / number[number > 0]
    mean_log = np.bincount(bins, np.log10(compute))[number > 0] / number[number > 0]
    first = np.unique(bins, return_index=True)[1]
    mean_position, mean_value, slope = (quantity[first] for quantity in fit)
    return 10**mean_log, mean_value + slope * (place - mean_position)


def smoothed(compute: np.ndarray, values: np.ndarray, learning_rate: np.ndarray | None = None) -> np.ndarray:
    """The fit of `smooth` at every point: float64, of the shape of `values`."""
    _, position, (mean_position, mean_value, slope) = _local_lines(_ascending(compute), values, learning_rate)
    return mean_value + slope * (position - mean_position)


def _ascending(compute: np.ndarray) -> np.ndarray:
    """Compute that falls nowhere and is above zero, as it is unless two journals are in one file."""
    return np.maximum.accumulate(np.maximum(compute, ONE_OPERATION))


def _local_lines(
    compute: np.ndarray, values: np.ndarray, learning_rate: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each point: its bin, its position (in windows), and its line: mean position, mean value, slope."""
    position = np.log10(compute / compute[0]) / DECADES
    if learning_rate is not None:
        changes = np.nan_to_num(np.abs(np.diff(learning_rate, prepend=learning_rate[:1])))
        peak = np.nanmax(learning_rate, initial=0)
        position += np.cumsum(changes) / (RATE * peak) if peak > 0 else 0
    bins = np.round(position * _PER_WINDOW).astype(int)
    reach = 3 * _PER_WINDOW
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _PER_WINDOW) ** 2)

    def windowed(quantity: np.ndarray) -> np.ndarray:
        return np.convolve(np.pad(np.bincount(bins, quantity), reach), window, mode="valid")[bins]

    weight = windowed(np.ones_like(values))
    mean_position, mean_value = windowed(position) / weight, windowed(values) / weight
    variance = windowed(position**2) / weight - mean_position**2
    covariance = windowed(position * values) / weight - mean_position * mean_value
    slope = np.where(variance > 1e-6, covariance / np.maximum(variance, 1e-6), 0.0)
    return bins, position, (mean_position, mean_value, slope)


# The lines of a run that a curve can be made of, and why others cannot.


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
