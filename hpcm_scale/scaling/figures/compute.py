"""Loss against compute: every run with frontier and law, and a figure of unfinished runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpcm_scale.errors import UserError
from hpcm_scale.formatting import count, label, new_figure, save
from hpcm_scale.scaling.analysis import Analysis
from hpcm_scale.scaling.figures.style import (
    COMPUTE,
    SHORT_COMPUTE,
    check_format,
    colours,
    column,
    log_axis,
    loss_label,
    number_log,
    ribbon,
    size_styles,
    tidy,
)
from hpcm_scale.scaling.filters import EVALUATION, TRAINING, learning_rates, smooth
from hpcm_scale.scaling.findings import SHORT, compute_law
from hpcm_scale.scaling.laws.law import Law
from hpcm_scale.scaling.observations import LOSSES, Study
from hpcm_scale.scaling.runs import Run

# Every run of a fit with both frontiers and the law of the annealed frontier.


LEARNING_CURVES = (
    "Loss of every run against cumulative training compute, smoothed. Grey steps: the whole frontier, the lowest "
    "smoothed loss up to each compute, annealed or not. Markers with black edges: the annealed frontier, to which the "
    "law is fitted if possible. Dashed: the law, extrapolated, with the prediction interval of one new training where "
    "it is within a factor of 1.5."
)


def draw_learning_curves(figure: Figure, study: Study, analysis: Analysis, extrapolate: float) -> bool:
    """Draw on an empty figure; False if no run has a curve."""
    if not study.curves:
        return False
    figure.set_size_inches(figure.get_figwidth(), 3.6)
    axes = figure.add_subplot()
    sizes = {curve.model: curve.parameters for curve in study.curves}
    styles = size_styles(sizes)
    law = compute_law(analysis)
    bottom, top = _loss_range(study, analysis)
    for curve in study.curves:
        visible = curve.smoothed <= top
        colour, _ = styles[curve.model]
        dot = "." if visible.sum() == 1 else None  # a line needs two points
        style = {"color": colour, "linewidth": 0.8, "alpha": 0.75, "marker": dot, "zorder": 3}
        axes.plot(curve.pflops[visible], curve.smoothed[visible], **style)
    drawn = (np.asarray(line.get_xdata()) for line in axes.lines)
    left = min((pflops[0] for pflops in drawn if pflops.size), default=1e-6)
    right = max(curve.pflops[-1] for curve in study.curves)
    _frontiers(axes, analysis, styles, top)
    if law is not None:
        bottom, right = _law(axes, law, analysis.level, extrapolate, bottom)
    log_axis(axes.xaxis, left * 0.9, right * 1.1, 7)
    log_axis(axes.yaxis, bottom * 0.98, top * 1.02, 7)
    axes.set_xlabel(SHORT_COMPUTE)
    axes.set_ylabel(loss_label(analysis))
    tidy(axes)
    handles = []
    for model in sorted(sizes, key=sizes.__getitem__):
        colour, mark = styles[model]
        text = f"{label(model)} ({count(sizes[model])})"
        handles += axes.plot([], [], color=colour, marker=mark, markersize=4, label=text)
    known, _ = axes.get_legend_handles_labels()
    column(figure, [*handles, *[handle for handle in known if handle not in handles]])
    return True


def _loss_range(study: Study, analysis: Analysis) -> tuple[float, float]:
    """Lowest smoothed loss, and the highest to draw: the loss falls manyfold at the start of a run."""
    lowest = min(curve.smoothed.min() for curve in study.curves)
    ends = [curve.smoothed[-1] for curve in study.curves]
    early = [np.interp(0.15 * curve.pflops[-1], curve.pflops, curve.smoothed) for curve in study.curves]
    annealed = [point.loss for point in analysis.frontier_annealed]
    return float(lowest), float(max(max(ends), min(max(early), 1.25 * max(ends)), *annealed, 1.05 * lowest) * 1.02)


def _frontiers(axes: Axes, analysis: Analysis, styles: dict[str, tuple[str, str]], top: float) -> None:
    whole = [(point.pflops, point.loss) for point in analysis.frontier if point.loss <= top]
    if whole:
        style = {"color": "0.62", "linewidth": 2.6, "drawstyle": "steps-post"}
        axes.plot(*zip(*whole, strict=True), label="whole frontier", **style)
    for point in analysis.frontier_annealed:
        colour, mark = styles[point.model]
        axes.plot(point.pflops, point.loss, mark, color=colour, markeredgecolor="black", markersize=5, zorder=5)
    if analysis.frontier_annealed:
        axes.plot([], [], "o", color="white", markeredgecolor="black", markersize=5, label="annealed frontier")


def _law(axes: Axes, law: Law, level: float, extrapolate: float, bottom: float) -> tuple[float, float]:
    """Draw a law of compute and its interval; returns the lowest loss and the largest compute of the axes."""
    low, high = law.observed["C"]
    compute = np.geomspace(low, high * extrapolate, 200)
    expected = law.predict(compute, level)
    axes.plot(compute, expected.value, "--", color="black", linewidth=1.1, zorder=4, label=f"law: {SHORT[law.name]}")
    drawn = ribbon(axes, compute, expected, color="black", alpha=0.09, label=f"{level * 100:g} % of new trainings")
    if drawn.any():
        bottom = min(bottom, max(float(expected.low[drawn].min()), 0.6 * bottom))
    return min(bottom, float(expected.value.min())), compute[-1]


# Runs, finished or not, without a fit (`hpcm scaling curves`).


OMITTED = 0.02
"""Fraction of each run, from its start, that is not drawn: the loss falls tenfold there."""


def draw_loss_against_compute(runs: Sequence[Run], path: str | Path) -> None:
    """Draw training loss (journal lines and smoothed) and evaluation loss against cumulative PFLOPs.

    The suffix of `path` selects the format: .png (1200 × 750 pixels), .svg or .pdf. Runs without training loss are
    left out. Raises UserError if none has a training loss, and for another suffix.
    """
    path = check_format(path)
    runs = sorted((run for run in runs if run.curve(TRAINING)[0].size), key=_compute_per_step)
    if not runs:
        raise UserError(
            "no-training-loss", "", "no run has a training loss yet; wait for the first lines of its journal"
        )

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
    """Draw one of `number` runs; returns the loss at the end of its curve."""
    compute, loss = run.curve(TRAINING)
    steps = run.records.column("step")[run.records.rows(TRAINING)]
    smoothed = smooth(compute, loss, learning_rates(run, steps))
    evaluated = run.curve(EVALUATION)
    first = compute[-1] * OMITTED

    def drawn(curve: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return curve[0][curve[0] >= first], curve[1][curve[0] >= first]

    axes.plot(*drawn(_thinned(compute, loss)), color=colour, linewidth=0.7, alpha=0.35 / number**0.5)
    axes.plot(*drawn(smoothed), color=colour, linewidth=2, solid_capstyle="round")
    axes.plot(*drawn(evaluated), "o", color=colour, markersize=5.5, markerfacecolor="white", zorder=3)
    return evaluated[1][-1] if evaluated[1].size else smoothed[1][-1]


def _thinned(compute: np.ndarray, loss: np.ndarray, most: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points, evenly over log(compute), which keeps the file small."""
    if compute.size <= most:
        return compute, loss
    chosen = np.unique(np.geomspace(1, compute.size, most).astype(int)) - 1
    return compute[chosen], loss[chosen]


def _scale(axes: Axes) -> None:
    """Logarithmic axes where the data span enough."""
    drawn = np.concatenate([line.get_xydata() for line in axes.lines])
    low, high = drawn.min(axis=0), drawn.max(axis=0)
    if high[0] > 10 * low[0] > 0:
        axes.set_xscale("log")
        number_log(axes.xaxis, (1, 2, 5) if high[0] < 500 * low[0] else (1,))
    if high[1] > 4 * low[1] > 0:
        axes.set_yscale("log")
        number_log(axes.yaxis, (1, 1.5, 2, 3, 5, 7) if high[1] < 10 * low[1] else (1, 2, 5))


def _labels(runs: Sequence[Run], ends: Sequence[float]) -> list[str]:
    """Shortest distinctive name of each run, with its final loss."""
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
    """Write each label right of the axes at the end of its curve, moved apart where labels would overlap."""
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
    """Title, axis labels and legend."""
    models = {run.config["model"]["name"] for run in runs}
    lambdas = sorted({run.config["objective"]["lmbda"] for run in runs})
    title = f"Loss against compute: {label(models.pop()) if len(models) == 1 else f'{len(models)} models'}"
    title += f", λ = {', '.join(f'{value:g}' for value in lambdas)}"
    axes.set_title(title, loc="left", fontweight="bold", pad=10)
    axes.set_xlabel(COMPUTE)
    losses = dict.fromkeys(LOSSES[run.setting("objective.distortion") or "mse"] for run in runs)
    axes.set_ylabel(f"rate-distortion loss\n{' or '.join(losses)} (bits per pixel)")
    tidy(axes)
    kinds = {
        f"training, from {OMITTED:.0%} of each run on": {"linewidth": 0.7, "alpha": 0.6},
        "training, smoothed": {"linewidth": 2},
        "evaluation": {"linestyle": "", "marker": "o", "markerfacecolor": "white"},
    }
    handles = [axes.plot([], [], color="0.4", label=text, **style)[0] for text, style in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
