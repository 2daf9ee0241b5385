"""Common style of the figures: type, colours, axes, and which part of the data they show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from hpcm_scale.formatting import count, counted, new_figure, superscript
from hpcm_scale.scaling.analysis import Analysis
from hpcm_scale.scaling.filters import TRAINING
from hpcm_scale.scaling.laws.law import Prediction
from hpcm_scale.scaling.observations import LOSSES

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette without yellow and black: distinct for colour-blind readers."""
MARKERS = "osD^vh<p>X"
WIDTH = 3.5
"""Inches: one column of a two-column paper, at the final type size."""
COMPUTE = "training compute C (PFLOPs)"
PARAMETERS = "parameters N"
OUTLIER = 4.0
"""Multiple of the median above which a loss does not widen the axis."""

_PAPER = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 6.8,
    "legend.title_fontsize": 6.8,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.0,
    "legend.borderpad": 0.2,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
}


@contextmanager
def paper() -> Iterator[Figure]:
    """A figure of one column's width; set its height, draw and save it within the context."""
    with new_figure(style=_PAPER, figsize=(WIDTH, WIDTH), dpi=300, layout="constrained") as figure:
        yield figure


def colours(number: int, ordered: bool = False) -> list[str]:
    """`number` colours, in order; from viridis if they are to look ordered, or are more than in the palette."""
    if number <= len(COLOURS) and not ordered:
        return list(COLOURS[:number])
    return [to_hex(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0, 0.85, number))]


# Logarithmic axes with round numbers.


def log_axis(axis: XAxis | YAxis, low: float, high: float, most: int = 6) -> None:
    """Make an axis logarithmic from `low` to `high` with about `most` round tick labels."""
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(low, high)
    axis.set_major_locator(FixedLocator(round_numbers(low, high, most)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_locator(NullLocator())


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """Round numbers between `low` and `high`, both positive: equally spaced below a factor of three."""
    if high < 3 * low:
        even = MaxNLocator(most - 1, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        return [value for value in even if low <= value <= high]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for multiples in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [
            float(f"{m}e{decade}") for decade in decades for m in multiples if low <= float(f"{m}e{decade}") <= high
        ]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def plain(value: float) -> str:
    """A tick label: 0.002, 50, or a power of ten such as 10⁶."""
    if 1e-4 <= value < 1e5:
        return f"{value:,.6g}"
    power = math.floor(math.log10(value) + 1e-9)
    digits = f"{value / 10**power:.3g}"
    return f"10{superscript(power)}" if digits == "1" else f"{digits}·10{superscript(power)}"


def count_axis(axes: Axes, low: float, high: float, text: str, most: int = 6) -> None:
    """A logarithmic x axis of counts with this label and ticks such as 300 k, 1 M, 3 M."""
    log_axis(axes.xaxis, low, high, most)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value, exact=True)))
    axes.set_xlabel(text)


def loss_label(analysis: Analysis) -> str:
    """Label of the loss axis."""
    kind = "training loss" if analysis.metric == TRAINING else "evaluation loss"
    return f"{kind}  {LOSSES[analysis.distortion]}"


# Which part of the data a figure shows.


def ordinary(losses: Sequence[float] | np.ndarray) -> np.ndarray:
    """Whether each loss is at most OUTLIER times the median, bool (n,): one bad run must not flatten a figure."""
    return np.asarray(losses) <= OUTLIER * np.median(losses)


def shown(
    curves: Sequence[tuple[np.ndarray, np.ndarray]], early: float, most: float
) -> tuple[float, tuple[float, float]]:
    """The least compute and the range of loss that show these curves, given as compute and loss, float64 (n,) each.

    The loss falls manyfold at the start of a run: the top is the highest loss after the fraction `early` of the compute
    of each run, but at most the multiple `most` of the highest end. Runs that are not `ordinary` do not count.
    """
    usual = ordinary([loss[-1] for _, loss in curves])
    curves = [curve for curve, chosen in zip(curves, usual, strict=True) if chosen]
    highest = max(loss[-1] for _, loss in curves)
    start = max(loss[compute >= early * compute[-1]].max() for compute, loss in curves)
    top = max(highest, min(start, most * highest))
    return min(compute[loss <= top][0] for compute, loss in curves), (min(loss.min() for _, loss in curves), top)


def note_outside(axes: Axes, number: Any, noun: str) -> None:
    """Say in a corner of the axes how many runs or trainings they do not show, if any."""
    if number:
        style: dict[str, Any] = {"ha": "right", "va": "top", "color": "0.35", "fontsize": "small"}
        axes.text(0.99, 0.99, f"{counted(int(number), noun)} outside this range", transform=axes.transAxes, **style)


def with_gaps(compute: np.ndarray, loss: np.ndarray, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute and loss, float64 (n,), with a NaN between lines of nearly equal compute where the learning rate drops.

    The loss drops with it, and a line would be a vertical stroke. Learning rates are float64 (n,), NaN where unknown.
    """
    fall = -np.diff(rates)
    at_once = fall > np.maximum(0.4 * rates[:-1], 0.2 * np.nanmax(rates, initial=0))
    drops = np.flatnonzero(at_once & (np.diff(np.log10(compute)) < 0.015)) + 1
    return np.insert(compute, drops, np.nan), np.insert(loss, drops, np.nan)


def band(axes: Axes, x: np.ndarray, expected: Prediction, **style) -> None:
    """Fill the interval of a prediction, float64 (n,) like `x`, if it has one; the axes clip it."""
    if not np.isfinite(expected.low).any():
        return
    low, high = np.maximum(expected.low, expected.value / 100), np.minimum(expected.high, expected.value * 100)
    axes.fill_between(x, low, high, linewidth=0, **style)
