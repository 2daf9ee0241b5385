"""Figures of loss against compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from hpcm_scale.errors import UserError
from hpcm_scale.files import whole_file
from hpcm_scale.scaling.runs import Run

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette without its yellow: told apart by colour-blind readers."""
FORMATS = (".png", ".svg", ".pdf")
LEFT_OUT = 0.02
"""Part of each run, from its start, that is not drawn: losses fall tenfold there and tell nothing."""


def smooth(compute: np.ndarray, values: np.ndarray, decades: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Local linear fit of `values` over log10(compute) under a Gaussian window.

    Takes two one-dimensional float64 arrays and the window's standard deviation (0.05: about a tenth of
    the compute so far); returns compute, ascending, at up to a few hundred places, and the fit there. The
    cost is linear in the number of points.
    """
    position = np.log10(compute / compute.min())
    bins = np.round(position / decades * 4).astype(int)
    window = np.exp(-0.5 * (np.arange(-12, 13) / 4) ** 2)
    count = np.bincount(bins)

    def windowed(quantity: np.ndarray) -> np.ndarray:
        return np.convolve(np.pad(np.bincount(bins, quantity), 12), window, mode="valid")[count > 0]

    weight = windowed(np.ones_like(values))
    mean_position, mean_value = windowed(position) / weight, windowed(values) / weight
    variance = windowed(position**2) / weight - mean_position**2
    covariance = windowed(position * values) / weight - mean_position * mean_value
    slope = np.where(variance > 1e-9, covariance / np.maximum(variance, 1e-9), 0.0)
    place = np.bincount(bins, position)[count > 0] / count[count > 0]
    return compute.min() * 10**place, mean_value + slope * (place - mean_position)


def draw_loss_against_compute(runs: Sequence[Run], path: str | Path) -> None:
    """Draw training loss (journal lines, and smoothed) and evaluation loss against cumulative PFLOPs.

    The format follows the suffix of `path`: .png (1200 × 750 pixels), .svg or .pdf. Runs without a training
    loss yet are left out; raises UserError when none has one, or the suffix is another.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UserError(f"cannot draw {path.name}; end its name in one of {', '.join(FORMATS)}")
    runs = sorted((run for run in runs if run.curve("train/loss")[0].size), key=_compute_per_step)
    if not runs:
        raise UserError("no run has a training loss yet; wait for the first lines of its journal")

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    colours = _colours(len(runs))
    ends = [_draw_run(axes, run, colour, len(runs)) for run, colour in zip(runs, colours, strict=True)]
    _scale(axes)
    _label_ends(axes, ends, _labels(runs, ends), colours)
    _explain(figure, axes, runs)
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format=path.suffix[1:])


def _compute_per_step(run: Run) -> float:
    return run.records[-1]["compute/pflops"] / run.step


def _colours(number: int) -> list[str]:
    if number <= len(COLOURS):
        return list(COLOURS[:number])
    return [to_hex(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0, 0.9, number))]


def _draw_run(axes: Axes, run: Run, colour: str, number: int) -> float:
    """Draw one of `number` runs; returns the height its curve ends at."""
    compute, loss = run.curve("train/loss")
    smoothed = smooth(compute, loss)
    evaluated = run.curve("eval/loss")
    first = compute[-1] * LEFT_OUT

    def drawn(curve: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return curve[0][curve[0] >= first], curve[1][curve[0] >= first]

    axes.plot(*drawn(_thinned(compute, loss)), color=colour, linewidth=0.7, alpha=0.35 / number**0.5)
    axes.plot(*drawn(smoothed), color=colour, linewidth=2, solid_capstyle="round")
    axes.plot(*drawn(evaluated), "o", color=colour, markersize=5.5, markerfacecolor="white", zorder=3)
    return evaluated[1][-1] if evaluated[1].size else smoothed[1][-1]


def _thinned(compute: np.ndarray, loss: np.ndarray, most: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points, evenly over log(compute): a million more would only make the file heavy."""
    if compute.size <= most:
        return compute, loss
    chosen = np.unique(np.geomspace(1, compute.size, most).astype(int)) - 1
    return compute[chosen], loss[chosen]


def _scale(axes: Axes) -> None:
    """Logarithmic axes where the data span enough, with round numbers on them."""
    drawn = np.concatenate([line.get_xydata() for line in axes.lines])
    low, high = drawn.min(axis=0), drawn.max(axis=0)
    if high[0] > 10 * low[0]:
        axes.set_xscale("log")
        _number(axes.xaxis, (1, 2, 5) if high[0] < 500 * low[0] else (1,))
    if high[1] > 4 * low[1]:
        axes.set_yscale("log")
        _number(axes.yaxis, (1, 1.5, 2, 3, 5, 7) if high[1] < 10 * low[1] else (1, 2, 5))


def _number(axis: Axis, multiples: tuple[float, ...]) -> None:
    axis.set_major_locator(LogLocator(subs=multiples, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def _labels(runs: Sequence[Run], ends: Sequence[float]) -> list[str]:
    """What sets each run apart, in as few words as will do, and the loss it came to."""
    times = Counter(run.config["model"]["name"] for run in runs)
    several_lambdas = len({run.config["objective"]["lmbda"] for run in runs}) > 1
    labels = []
    for run, end in zip(runs, ends, strict=True):
        model = run.config["model"]["name"]
        label = f"{model if times[model] == 1 else run.name}  {end:#.3g}"
        if several_lambdas:
            label += f"\nλ = {run.config['objective']['lmbda']:g}"
        if not run.finished:
            label += f"\n{run.step / run.config['train']['steps']:.0%} trained"
        labels.append(label)
    return labels


def _label_ends(axes: Axes, ends: Sequence[float], labels: Sequence[str], colours: Sequence[str]) -> None:
    """Write each label right of the axes, at the height its curve ends, pushed apart where they meet."""
    to_fraction = axes.transData + axes.transAxes.inverted()
    centres = np.array([to_fraction.transform((axes.get_xlim()[1], end))[1] for end in ends])
    lines = np.array([1 + label.count("\n") for label in labels])
    line = min(0.048, 1 / lines.sum())  # of the axes' height; smaller type for very many runs
    order = np.argsort(centres, kind="stable")
    for upwards, edge in ((1, 0.0), (-1, 1.0)):
        for index in order[::upwards]:
            half = upwards * lines[index] * line / 2
            centres[index] = edge + half if upwards * (centres[index] - half - edge) < 0 else centres[index]
            edge = centres[index] + half
    for label, centre, colour in zip(labels, centres, colours, strict=True):
        place = {"xy": (1.015, centre), "xycoords": "axes fraction", "verticalalignment": "center"}
        axes.annotate(label, **place, color=colour, fontsize=10 * line / 0.048)


def _explain(figure: Figure, axes: Axes, runs: Sequence[Run]) -> None:
    models = {run.config["model"]["name"] for run in runs}
    lambdas = sorted({run.config["objective"]["lmbda"] for run in runs})
    title = f"Loss against compute: {models.pop() if len(models) == 1 else f'{len(models)} models'}"
    title += f", λ = {', '.join(f'{value:g}' for value in lambdas)}"
    axes.set_title(title, loc="left", fontweight="bold", pad=10)
    axes.set_xlabel("training compute (PFLOPs; 1 PFLOP = 10¹⁵ floating-point operations)")
    axes.set_ylabel("rate-distortion loss\nλ·255²·MSE + bpp (bits per pixel)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    kinds = [
        Line2D(
            [],
            [],
            color="0.4",
            linewidth=0.7,
            alpha=0.6,
            label=f"training, from {LEFT_OUT:.0%} of each run on",
        ),
        Line2D([], [], color="0.4", linewidth=2, label="training, smoothed"),
        Line2D([], [], color="0.4", linestyle="", marker="o", markerfacecolor="white", label="evaluation"),
    ]
    figure.legend(handles=kinds, loc="outside lower center", ncols=3, frameon=False)
