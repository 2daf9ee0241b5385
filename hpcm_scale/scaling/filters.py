"""Run metadata, smoothing, and the journal lines of a curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import median_filter

from hpcm_scale.errors import printable
from hpcm_scale.scaling.runs import Run

# Run metadata: model size, learning rate, parent of a cooldown.


ANNEALED = 0.1
"""A learning rate at or below this fraction of its peak counts as decayed."""


def parameters_of(config: dict[str, Any]) -> int:
    """Number of parameters of the model in a run's configuration. Raises UserError if this version cannot build it."""
    model = {key: value for key, value in config["model"].items() if key != "name"}
    return _parameters_of(json.dumps(model, sort_keys=True))


@cache
def _parameters_of(model: str) -> int:
    from hpcm_scale.config.compose import model_from_dict
    from hpcm_scale.model.parameters import on_meta, parameter_count

    return parameter_count(on_meta(model_from_dict(json.loads(model))))


def training_pixels(config: dict[str, Any], steps: np.ndarray, images: np.ndarray) -> np.ndarray | None:
    """Training pixels after `steps` and `images`, float64 (n,); None if the configuration lacks data.crop.

    If crops change during training, the number of pixels per step stays the same (`config.spec.Phase`).
    """
    crop = (config.get("data") or {}).get("crop")
    if not crop:
        return None
    changing = (config.get("schedule") or {}).get("crops")
    return steps * config["train"]["batch_size"] * crop**2 if changing else images * crop**2


def learning_rates(run: Run, steps: np.ndarray) -> np.ndarray:
    """Learning rate of the last training line at or before each step, float64 (n,); NaN before the first line."""
    rows = run.records.rows("train/learning_rate")
    known, rates = (run.records.column(key)[rows] for key in ("step", "train/learning_rate"))
    return np.append(rates, np.nan)[np.searchsorted(known, steps, side="right") - 1]


def annealed(config: dict[str, Any], steps: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Whether the learning rate has decayed to `ANNEALED` of its peak after warm-up, bool (n,).

    False where the rate is unknown (NaN) or the configuration does not give the peak.
    """
    schedule = config.get("schedule") or {}
    peak = schedule.get("learning_rate", 0) * max(schedule.get("factors") or [1])
    return (rates <= ANNEALED * peak * (1 + 1e-9)) & (steps > schedule.get("warmup", 0))


def cooldown_parent(run: Run, runs: Sequence[Run]) -> str | None:
    """Name of the constant-rate run that a cooldown starts from; None for other runs.

    Folders may have been moved: of `runs`, it is the one in the recorded folder or else the nearest one whose folder
    has the same name. Without such a run the result is the folder's name.
    """
    path = run.setting("run.cooldown_of")
    if path is None:
        return None
    candidates = [other for other in runs if PurePath(path).name in (other.folder.name, PurePath(other.name).name)]

    def distance(other: Run) -> tuple[bool, int, str]:
        shared = sum(mine == its for mine, its in zip(run.folder.parts, other.folder.parts, strict=False))
        return str(other.folder) != path, -shared, other.name

    return min(candidates, key=distance).name if candidates else printable(PurePath(path).name)


# Smoothing of noisy losses over compute that preserves the effect of a falling learning rate.


DECADES = 0.05
"""Standard deviation of the window in log10(compute): about a tenth of the compute so far."""
RATE = 0.1
"""Change of the learning rate, as a fraction of its peak, that counts as much as DECADES of compute. The loss falls
within a few percent of a run while the rate decays, or at once where it drops: a window across both sides would lower
the curve before the decay and raise it after."""
ONE_OPERATION = 1e-15
"""Lower bound of compute, PFLOPs."""
_PER_WINDOW = 4
"""Bins per standard deviation of the window."""
SPIKE, LEAST_SPIKE = 5.0, 0.2
_MEDIAN = 7
"""Lines of the median that spikes are compared with."""


def smooth(
    compute: np.ndarray, values: np.ndarray, learning_rate: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Local linear fit of `values` over log10(compute) under a Gaussian window, for drawing.

    Takes float64 (n,) arrays, ascending in compute. Returns compute, ascending, at up to a few hundred places, and the
    fit there. The cost is linear in n.
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
    """The fit of `smooth` at every point, float64 (n,)."""
    _, position, (mean_position, mean_value, slope) = _local_lines(_ascending(compute), values, learning_rate)
    return mean_value + slope * (position - mean_position)


def without_spikes(values: np.ndarray) -> np.ndarray:
    """`values`, positive, float64 (n,), where spikes of one or two lines are replaced by the median around them.

    A spike is above the median of seven lines by `SPIKE` standard deviations of the run's scatter, and by `LEAST_SPIKE`
    of its value. Bounded so, it does not move the end of a curve.
    """
    logs = np.log(np.maximum(values, 1e-300))
    excess = logs - median_filter(logs, _MEDIAN, mode="mirror")
    spikes = excess > max(SPIKE * 1.4826 * float(np.median(np.abs(excess))), np.log1p(LEAST_SPIKE))
    spikes[: _MEDIAN // 2] = False  # the loss falls manyfold there
    return np.where(spikes, values * np.exp(-excess), values)


def _ascending(compute: np.ndarray) -> np.ndarray:
    """Compute made non-decreasing and positive; it is already, unless one file holds two journals."""
    return np.maximum.accumulate(np.maximum(compute, ONE_OPERATION))


def _local_lines(
    compute: np.ndarray, values: np.ndarray, learning_rate: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each point its bin, its position in windows, and its line: mean position, mean value, slope."""
    values = without_spikes(values)
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


# Journal lines of a curve.


EVALUATION, TRAINING = "eval/loss", "train/loss"
SHORTEST = 20
"""Smallest number of training lines that are smoothed."""


class Excluded(Exception):
    """Why a run is excluded; the text follows "is excluded: "."""


class Lines(NamedTuple):
    """Lines with a finite value of a metric; float64 (n,), all but the loss ascending."""

    steps: np.ndarray
    pflops: np.ndarray
    images: np.ndarray
    loss: np.ndarray


def usable_lines(run: Run, metric: str) -> Lines:
    """The lines of a run with `metric`. Raises Excluded if they do not form a curve."""
    records = run.records
    rows = records.rows(metric)
    if not rows.size and records.nulls[metric]:
        raise Excluded(f"its {metric} was never finite")
    if not rows.size:
        missing = {EVALUATION: "it has no evaluation yet", TRAINING: "it has no training line"}
        raise Excluded(missing.get(metric, f"it has no {metric}"))
    if metric == TRAINING and rows.size < SHORTEST:
        lines = "1 training line is" if rows.size == 1 else f"{rows.size} training lines are"
        every = run.setting("log.every")
        often = "" if every == 1 else " or with a lower log.every" + (f" (it is {every})" if every else "")
        raise Excluded(f"{lines} too few to smooth; {SHORTEST} are needed: train longer{often}")
    lines = Lines(*(records.column(key)[rows] for key in ("step", "compute/pflops", "train/images", metric)))
    stuck = np.flatnonzero(~((np.diff(lines.pflops) > 0) & (np.diff(lines.images) > 0)))
    if stuck.size:
        before, after = lines.steps[stuck[0] : stuck[0] + 2]
        raise Excluded(
            f"its compute or images do not grow from step {before:.0f} to {after:.0f}; check that it is one journal"
        )
    if not (lines.pflops[0] > 0 and lines.images[0] > 0 and lines.loss.min() > 0):
        raise Excluded("its compute, images and loss are not all above zero")
    return lines


def end(run: Run, metric: str, step: float) -> float | None:
    """An evaluation's `metric` at `step`, or the end of the smoothed training curve up to it; None without lines."""
    rows = run.records.rows(metric)
    steps, pflops, values = (run.records.column(key)[rows] for key in ("step", "compute/pflops", metric))
    if metric.startswith("eval/"):
        at = np.flatnonzero(steps == step)
        return float(values[at[0]]) if at.size else None
    until = steps <= step
    if not until.any():
        return None
    return float(smoothed(pflops[until], values[until], learning_rates(run, steps[until]))[-1])


def excluded_lines(run: Run, metric: str) -> list[str]:
    """One sentence for each kind of journal line that the run's curve leaves out."""
    sentences = []
    if repeated := run.records.repeated(metric):
        sentences.append(f"{run.name}: {_count(repeated)} the step of a later line, which is used instead")
    if nulls := run.records.nulls[metric]:
        verb = "is" if nulls == 1 else "are"
        sentences.append(f"{run.name}: {_count(nulls)} no finite {metric} and {verb} excluded")
    return sentences


def _count(lines: int) -> str:
    return f"{lines:,} line{' has' if lines == 1 else 's have'}"
