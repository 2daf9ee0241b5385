"""Loss against compute: the runs of a fit with frontier and law, and a figure of runs without a fit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpcm_scale.errors import UserError
from hpcm_scale.formatting import count, label, new_figure, save, significant, tidy
from hpcm_scale.scaling.analysis import COMPUTE_LAWS, SHORT, Analysis
from hpcm_scale.scaling.figures.style import (
    COMPUTE,
    MARKERS,
    band,
    colours,
    log_axis,
    loss_label,
    note_outside,
    shown,
    with_gaps,
)
from hpcm_scale.scaling.filters import EVALUATION, ONE_OPERATION, TRAINING, learning_rates, parameters_of, smooth
from hpcm_scale.scaling.observations import LOSSES, Study
from hpcm_scale.scaling.runs import Run

# Every run of a fit, with the frontier and the law of compute.


LEARNING_CURVES = (
    "Smoothed loss of every run against cumulative training compute; cooldowns are thinner. Grey steps: the frontier, "
    "the lowest loss up to each compute. Markers: the end of each run whose learning rate has decayed, filled if it is "
    "on the frontier. Dashed: the law of compute, fitted to the annealed points of the frontier if there are any, and "
    "extrapolated; shaded: the prediction interval of one new training."
)


def draw_learning_curves(figure: Figure, study: Study, analysis: Analysis, extrapolate: float) -> bool:
    """Draw on an empty figure; False if no run has a curve."""
    if not study.curves:
        return False
    figure.set_size_inches(figure.get_figwidth(), 3.9)
    axes = figure.add_subplot()
    sizes = sorted({curve.parameters for curve in study.curves})
    styles = dict(zip(sizes, zip(colours(len(sizes)), cycle(MARKERS), strict=False), strict=True))
    cooldowns = {each.run for each in study.observations if each.cooldown_of}
    left, (bottom, top) = shown([(curve.pflops, curve.smoothed) for curve in study.curves], 0.15, 1.25)
    right = max(curve.pflops[-1] for curve in study.curves)
    for curve in study.curves:
        width = 0.5 if curve.run in cooldowns else 0.9
        line = with_gaps(curve.pflops, curve.smoothed, curve.learning_rate)
        axes.plot(*line, color=styles[curve.parameters][0], linewidth=width, alpha=0.85, zorder=3)
    if analysis.frontier:
        steps = [(point.pflops, point.loss) for point in analysis.frontier]
        axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color="0.7", linewidth=2.2, label="frontier")
    _draw_ends(axes, study, analysis, styles)
    if COMPUTE_LAWS[0] in analysis.laws:
        least, right = _draw_law(axes, analysis, extrapolate)
        bottom = min(bottom, least)
    log_axis(axes.xaxis, left * 0.9, right * 1.1, 7)
    log_axis(axes.yaxis, bottom * 0.96, top * 1.04, 7)
    axes.set_xlabel(COMPUTE)
    axes.set_ylabel(loss_label(analysis))
    note_outside(axes, sum(curve.smoothed[-1] > top for curve in study.curves), "run")
    tidy(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    handles = []
    for size, (colour, mark) in styles.items():
        names = dict.fromkeys(curve.model for curve in study.curves if curve.parameters == size)
        handles += axes.plot([], [], color=colour, marker=mark, label=f"{label(', '.join(names))} ({count(size)})")
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return True


def _draw_ends(axes: Axes, study: Study, analysis: Analysis, styles: dict[int, tuple[str, str]]) -> None:
    """Markers at the ends of annealed runs; dots for other curves of one point, which have no line."""
    on = {point.run for point in analysis.frontier if point.annealed}
    kinds: dict[str, dict[str, Any]] = {
        "annealed, on the frontier": {"markeredgecolor": "black", "markersize": 4.5, "zorder": 6},
        "annealed, off the frontier": {"markerfacecolor": "none", "markersize": 3.5, "zorder": 5},
        "only one line, not annealed": {"marker": ".", "markersize": 3, "zorder": 4},
    }
    found = set()
    for curve in study.curves:
        if not curve.annealed[-1] and len(curve.pflops) > 1:
            continue
        kind = list(kinds)[0 if curve.run in on else 1 if curve.annealed[-1] else 2]
        colour, mark = styles[curve.parameters]
        style: dict[str, Any] = {"marker": mark, "color": colour, "linestyle": "", "markeredgewidth": 0.8} | kinds[kind]
        axes.plot(curve.pflops[-1], curve.smoothed[-1], **style)
        found.add(kind)
    grey: dict[str, Any] = {"color": "0.6", "marker": "o", "linestyle": ""}
    for kind, style in kinds.items():
        if kind in found:
            axes.plot([], [], **grey | style, label=kind)


def _draw_law(axes: Axes, analysis: Analysis, extrapolate: float) -> tuple[float, float]:
    """Draw the law of compute; returns the lowest loss and the greatest compute to show."""
    law = next(analysis.laws[name] for name in reversed(COMPUTE_LAWS) if name in analysis.laws)
    low, high = law.observed["C"]
    compute = np.geomspace(low, high * extrapolate, 200)
    expected = analysis.at_compute(compute)
    axes.plot(compute, expected.value, "--", color="black", linewidth=1.1, zorder=4, label=SHORT[law.name])
    text = f"{analysis.level * 100:g} % of new trainings"
    band(axes, compute, expected, color="black", alpha=0.1, label=text)
    lowest = float(expected.value.min())
    return max(0.6 * lowest, float(np.nanmin([lowest, *expected.low]))), float(compute[-1])


# Runs, finished or not, without a fit (`hpcm scaling curves`).


FORMATS = (".png", ".svg", ".pdf")
MOST_LABELS = 8
"""Runs up to which each has its own label."""
LEAST = 1e-6
"""Least loss on an axis, which is logarithmic."""


def draw_loss_against_compute(runs: Sequence[Run], path: str | Path) -> None:
    """Draw training loss (journal lines and smoothed) and evaluation loss against cumulative PFLOPs.

    Colours tell sizes apart, or runs if they are few and of one size. The legend names each run, or the best run of
    each size and λ if there are many. The suffix of `path` selects the format: .png (1200 × 750 pixels), .svg or .pdf.
    Runs without training loss are left out. Raises UserError if none has a training loss, and for another suffix.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UserError(
            "unknown-figure-format", "--out", f"cannot draw {path.name}; use a suffix of {', '.join(FORMATS)}"
        )
    ordered = sorted(((_size(run), run) for run in runs if run.curve(TRAINING)[0].size), key=lambda pair: pair[0])
    if not ordered:
        raise UserError(
            "no-training-loss", "", "no run has a training loss yet; wait for the first lines of its journal"
        )
    sizes, runs = zip(*ordered, strict=True)
    keys = range(len(runs)) if len(set(sizes)) == 1 and len(runs) <= MOST_LABELS else sizes
    palette = dict(zip(dict.fromkeys(keys), colours(len(set(keys))), strict=True))
    with new_figure(figsize=(8, 5), dpi=150, layout="constrained") as figure:
        axes = figure.add_subplot()
        curves = [_draw_run(axes, run, palette[key], len(runs)) for run, key in zip(runs, keys, strict=True)]
        _dress(figure, axes, runs, curves)
        named = [
            _Named(run, size, palette[key], "eval" if len(both) > 1 else "train", both[-1][1][-1])
            for run, size, key, both in zip(runs, sizes, keys, curves, strict=True)
        ]
        _name(figure, axes, named)
        save(figure, path)


def _size(run: Run) -> tuple[int, str]:
    """Parameters, 0 if this version cannot build the model, and the model's name."""
    try:
        return parameters_of(run.config), run.config["model"]["name"]
    except UserError:
        return 0, run.config["model"]["name"]


def _draw_run(axes: Axes, run: Run, colour: str, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw one of `number` runs; returns smoothed and, if any, evaluated losses over compute, float64 (n,) each."""
    training, (spent, evaluated) = (run.curve(metric) for metric in (TRAINING, EVALUATION))
    rates = learning_rates(run, run.records.column("step")[run.records.rows(TRAINING)])
    place, loss = smooth(*training, rates)
    evaluation = np.maximum(spent, ONE_OPERATION), evaluated
    axes.plot(*training, color=colour, linewidth=0.7, alpha=0.35 / number**0.5, rasterized=True)
    width, dot = 1 if run.setting("run.cooldown_of") else 2, "." if place.size == 1 else None
    line = with_gaps(place, loss, np.interp(place, training[0], rates))
    axes.plot(*line, color=colour, linewidth=width, marker=dot, solid_capstyle="round")
    size = 5.5 if number <= MOST_LABELS else 3.5
    axes.plot(*evaluation, "o", color=colour, markersize=size, markerfacecolor="white", zorder=3)
    return [(place, loss), evaluation] if evaluated.size else [(place, loss)]


def _dress(
    figure: Figure, axes: Axes, runs: Sequence[Run], curves: Sequence[list[tuple[np.ndarray, np.ndarray]]]
) -> None:
    """Range, title, axis labels, and the legend of kinds."""
    positive = [(place, np.maximum(loss, LEAST)) for both in curves for place, loss in both]
    left, (bottom, top) = shown(positive, 0.02, 3)
    bottom = min(bottom, *(max(np.quantile(run.curve(TRAINING)[1], 0.01), LEAST) for run in runs))
    log_axis(axes.xaxis, left * 0.9, max(both[0][0][-1] for both in curves) * 1.15, 8)
    log_axis(axes.yaxis, bottom * 0.95, top * 1.1, 8)
    note_outside(axes, sum(both[-1][1][-1] > top * 1.1 for both in curves), "run")
    lambdas = sorted({run.config["objective"]["lmbda"] for run in runs})
    title = f"Loss against compute, λ = {', '.join(f'{value:g}' for value in lambdas)}"
    axes.set_title(title, loc="left", fontweight="bold", pad=10)
    axes.set_xlabel("training compute (PFLOPs; 1 PFLOP = 10¹⁵ floating-point operations)")
    losses = dict.fromkeys(LOSSES[run.setting("objective.distortion") or "mse"] for run in runs)
    axes.set_ylabel(f"rate-distortion loss\n{' or '.join(losses)} (bits per pixel)")
    tidy(axes)
    kinds = {
        "training": {"linewidth": 0.7, "alpha": 0.6},
        "training, smoothed": {"linewidth": 2},
        "evaluation": {"linestyle": "", "marker": "o", "markerfacecolor": "white"},
    }
    handles = [axes.plot([], [], color="0.4", label=text, **style)[0] for text, style in kinds.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)


class _Named(NamedTuple):
    """A run in the legend."""

    run: Run
    size: tuple[int, str]
    colour: str
    kind: str
    """Of the loss at its end: "eval" or, without evaluations, "train"."""
    end: float


def _name(figure: Figure, axes: Axes, named: Sequence[_Named]) -> None:
    """A legend of the runs with the loss at their end, the highest first; of many runs the best one of each group."""
    groups: dict[Any, list[_Named]] = {}
    lambdas = {each.run.config["objective"]["lmbda"] for each in named}
    for each in named:
        key = (each.size, each.run.config["objective"]["lmbda"]) if len(named) > MOST_LABELS else each.run.folder
        groups.setdefault(key, []).append(each)
    best = [(min(group, key=lambda each: (each.kind, each.end)), len(group)) for group in groups.values()]
    handles = []
    for (run, (parameters, model), colour, kind, end), number in sorted(best, key=lambda pair: -pair[0].end):
        several = sum(each.size[1] == model for each in named) > number
        if number == 1:
            text = f"{label(run.name if several else model)}\n"
        else:
            text = f"{label(model)}{f' ({count(parameters)})' * several}, {number} runs\nbest "
        text += f"{kind} {significant(end, 3)}"
        if len(lambdas) > 1:
            text += f", λ = {run.config['objective']['lmbda']:g}"
        if number == 1 and not run.finished:
            text += f", {run.step / run.config['train']['steps']:.0%} trained"
        handles += axes.plot([], [], color=colour, linewidth=2, label=text)
    style = {"frameon": False, "handlelength": 1, "fontsize": min(10, 190 / len(handles))}
    figure.legend(handles=handles, loc="outside right center", **style)
