"""Training and evaluation loss of runs, finished or not, against compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hpcm_scale.errors import UserError
from hpcm_scale.formatting import label, new_figure, save
from hpcm_scale.scaling.figures.style import COMPUTE, calm, check_format, colours, number_log
from hpcm_scale.scaling.filters import learning_rates, smooth
from hpcm_scale.scaling.runs import Run
from hpcm_scale.scaling.wording import LOSSES

LEFT_OUT = 0.02
"""Part of each run, from its start, that is not drawn: losses fall tenfold there and tell nothing."""


def draw_loss_against_compute(runs: Sequence[Run], path: str | Path) -> None:
    """Draw training loss (journal lines, and smoothed) and evaluation loss against cumulative PFLOPs.

    The format follows the suffix of `path`: .png (1200 × 750 pixels), .svg or .pdf. Runs without a training
    loss yet are left out; raises UserError when none has one, or the suffix is another.
    """
    path = check_format(path)
    runs = sorted((run for run in runs if run.curve("train/loss")[0].size), key=_compute_per_step)
    if not runs:
        raise UserError("no run has a training loss yet; wait for the first lines of its journal")

    palette = colours(len(runs))
    with new_figure(figsize=(8, 5), dpi=150, layout="constrained") as figure:
        axes = figure.add_subplot()
        ends = [_draw_run(axes, run, colour, len(runs)) for run, colour in zip(runs, palette, strict=True)]
        _scale(axes)
        _label_ends(axes, ends, _labels(runs, ends), palette)
        _explain(figure, axes, runs)
        save(figure, path)


def _compute_per_step(run: Run) -> float:
    return run.records[-1]["compute/pflops"] / run.step


def _draw_run(axes: Axes, run: Run, colour: str, number: int) -> float:
    """Draw one of `number` runs; returns the height its curve ends at."""
    compute, loss = run.curve("train/loss")
    steps = run.records.column("step")[run.records.rows("train/loss")]
    smoothed = smooth(compute, loss, learning_rates(run, steps))
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
    if high[0] > 10 * low[0] > 0:
        axes.set_xscale("log")
        number_log(axes.xaxis, (1, 2, 5) if high[0] < 500 * low[0] else (1,))
    if high[1] > 4 * low[1] > 0:
        axes.set_yscale("log")
        number_log(axes.yaxis, (1, 1.5, 2, 3, 5, 7) if high[1] < 10 * low[1] else (1, 2, 5))


def _labels(runs: Sequence[Run], ends: Sequence[float]) -> list[str]:
    """What sets each run apart, in as few words as will do, and the loss it came to."""
    times = Counter(run.config["model"]["name"] for run in runs)
    several_lambdas = len({run.config["objective"]["lmbda"] for run in runs}) > 1
    labels = []
    for run, end in zip(runs, ends, strict=True):
        model = run.config["model"]["name"]
        text = f"{label(model if times[model] == 1 else run.name)}  {end:#.3g}"
        if several_lambdas:
            text += f"\nλ = {run.config['objective']['lmbda']:g}"
        if not run.finished:
            text += f"\n{run.step / run.config['train']['steps']:.0%} trained"
        labels.append(text)
    return labels


def _label_ends(axes: Axes, ends: Sequence[float], labels: Sequence[str], colours: Sequence[str]) -> None:
    """Write each label right of the axes, at the height its curve ends, pushed apart where they meet."""
    to_fraction = axes.transData + axes.transAxes.inverted()
    centres = np.array([to_fraction.transform((axes.get_xlim()[1], end))[1] for end in ends])
    lines = np.array([1 + text.count("\n") for text in labels])
    line = min(0.048, 1 / lines.sum())  # of the axes' height; smaller type for very many runs
    order = np.argsort(centres, kind="stable")
    for upwards, edge in ((1, 0.0), (-1, 1.0)):
        for index in order[::upwards]:
            half = upwards * lines[index] * line / 2
            centres[index] = edge + half if upwards * (centres[index] - half - edge) < 0 else centres[index]
            edge = centres[index] + half
    for text, centre, colour in zip(labels, centres, colours, strict=True):
        place = {"xy": (1.015, centre), "xycoords": "axes fraction", "verticalalignment": "center"}
        axes.annotate(text, **place, color=colour, fontsize=10 * line / 0.048)


def _explain(figure: Figure, axes: Axes, runs: Sequence[Run]) -> None:
    models = {run.config["model"]["name"] for run in runs}
    lambdas = sorted({run.config["objective"]["lmbda"] for run in runs})
    title = f"Loss against compute: {label(models.pop()) if len(models) == 1 else f'{len(models)} models'}"
    title += f", λ = {', '.join(f'{value:g}' for value in lambdas)}"
    axes.set_title(title, loc="left", fontweight="bold", pad=10)
    axes.set_xlabel(COMPUTE)
    losses = dict.fromkeys(LOSSES[run.config["objective"].get("distortion", "mse")] for run in runs)
    axes.set_ylabel(f"rate-distortion loss\n{' or '.join(losses)} (bits per pixel)")
    calm(axes)
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
