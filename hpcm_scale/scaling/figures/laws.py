"""Figures of the laws: loss against parameters, slices at equal compute, residuals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpcm_scale.formatting import count, significant
from hpcm_scale.scaling.analysis import PARAMETER_LAWS, PARAMETERS_AND_DATA, Analysis
from hpcm_scale.scaling.figures.style import (
    COLOURS,
    PARAMETERS,
    SHORT_COMPUTE,
    colours,
    column,
    log_axis,
    loss_label,
    marker,
    number_parameters,
    ribbon,
    tidy,
)
from hpcm_scale.scaling.findings import SHORT
from hpcm_scale.scaling.fit_data import Slice, isoflop_slices
from hpcm_scale.scaling.laws.law import Law
from hpcm_scale.scaling.observations import Curve, Study

# Loss against parameters.


LOSS_AGAINST_PARAMETERS = (
    "Loss at the end of training against parameters. Filled: the trainings to which the laws of parameters are fitted; "
    "hollow: the others. Lines: the laws, with the prediction interval of one new training where it is within a factor "
    "of 1.5; nothing was observed right of the dotted line. L(N, D) is drawn for the most training pixels D among its "
    "runs."
)
LINES: dict[str, str] = dict(zip((*PARAMETER_LAWS, PARAMETERS_AND_DATA), ("--", "-", "-."), strict=True))


def draw_loss_against_parameters(figure: Figure, study: Study, analysis: Analysis, extrapolate: float) -> bool:
    """Draw on an empty figure; False if there is one size only. Laws with an exponent at a bound are left out."""
    sizes = [point.parameters for point in analysis.observations]
    if len(set(sizes)) < 2:
        return False
    figure.set_size_inches(figure.get_figwidth(), 3.1)
    axes = figure.add_subplot()
    losses = [point.loss for point in analysis.observations]
    laws = [law for name in LINES if (law := analysis.laws.get(name)) and not law.at_bound]
    end = max(sizes) * (extrapolate if laws else 1)
    bounds = [min(losses) * 0.97, max(losses) * 1.02]
    for law in laws:
        low, high = _line(axes, law, np.geomspace(law.observed["N"][0] * 0.9, end, 200), analysis)
        bounds[0] = min(bounds[0], max(low, 0.7 * min(losses)) * 0.98)
        bounds[1] = max(bounds[1], min(high, 1.3 * max(losses)) * 1.01)
    _points(axes, analysis)
    saturating = analysis.laws.get(PARAMETER_LAWS[1])
    if saturating in laws and saturating.parameters["E"] > bounds[0]:
        level = saturating.parameters["E"]
        text = f"irreducible loss E = {significant(level, 3)}"
        axes.axhline(level, color=COLOURS[1], linewidth=0.8, linestyle=":", label=text)
    if end > max(sizes):
        axes.axvline(max(sizes) * 1.12, color="0.55", linewidth=0.8, linestyle=":", zorder=1)
    log_axis(axes.xaxis, min(sizes) * 0.75, end * 1.1)
    log_axis(axes.yaxis, bounds[0], bounds[1])
    _over_parameters(figure, axes, analysis)
    return True


def _line(axes: Axes, law: Law, sizes: np.ndarray, analysis: Analysis) -> tuple[float, float]:
    """Draw a law; returns the lowest and the highest loss of line and interval."""
    colour = COLOURS[list(LINES).index(law.name)]
    pixels = law.observed["D"][1] if "D" in law.observed else None
    expected = law.predict(sizes if pixels is None else (sizes, np.full_like(sizes, pixels)), analysis.level)
    text = SHORT[law.name] if pixels is None else f"{SHORT[law.name]}, D = {count(pixels)}px"
    if law.name == analysis.preferred.get("parameters"):
        text += " (preferred)"
    axes.plot(sizes, expected.value, LINES[law.name], color=colour, label=text, zorder=3)
    drawn = ribbon(axes, sizes, expected, color=colour, alpha=0.14, zorder=2)
    edges = [np.where(drawn, edge, np.nan) for edge in (expected.low, expected.high)]
    for edge in edges:
        axes.plot(sizes, edge, color=colour, linewidth=0.4, alpha=0.6, zorder=2)
    return float(np.nanmin([edges[0], expected.value])), float(np.nanmax([edges[1], expected.value]))


def _points(axes: Axes, analysis: Analysis) -> None:
    used = {run for name in PARAMETER_LAWS if name in analysis.laws for run in analysis.laws[name].runs}
    for point in analysis.observations:
        style = {"color": "black", "zorder": 5} if point.run in used else {"color": "0.45", "mfc": "none", "zorder": 4}
        axes.plot(point.parameters, point.loss, "o", markersize=4, markeredgewidth=0.8, **style)
    hollow = {"color": "0.45", "mfc": "none", "markeredgewidth": 0.8}
    if used:
        axes.plot([], [], "o", color="black", markersize=4, label="fitted")
    if any(point.run not in used for point in analysis.observations):
        axes.plot([], [], "o", markersize=4, label="not fitted: other amount\nof data, or not annealed", **hollow)


def _over_parameters(figure: Figure, axes: Axes, analysis: Analysis) -> None:
    """Axis labels and legend of loss over parameters."""
    number_parameters(axes.xaxis)
    axes.set_xlabel(PARAMETERS)
    axes.set_ylabel(loss_label(analysis))
    tidy(axes)
    column(figure, axes.get_legend_handles_labels()[0], 2)


# Slices at equal compute.


ISOFLOP = (
    "Loss against parameters at equal training compute, from the smoothed curves of all runs, annealed or not. Lines: "
    "parabolas in log N. Stars: their minima, where those are between trained sizes."
)
SLICES = 5
LEAST_SIZES = 3


def draw_isoflop(figure: Figure, study: Study, analysis: Analysis, extrapolate: float) -> bool:
    """Draw on an empty figure; False if no three sizes have a compute budget in common."""
    slices = [
        each for each in isoflop_slices(study.curves, budgets(study.curves)) if len(each.parameters) >= LEAST_SIZES
    ]
    if not slices:
        return False
    figure.set_size_inches(figure.get_figwidth(), 3.2)
    axes = figure.add_subplot()
    lowest = min(each.loss.min() for each in slices)
    top = min(max(each.loss.max() for each in slices), 2.5 * lowest)
    for index, (each, colour) in enumerate(zip(slices, colours(len(slices)), strict=True)):
        _slice(axes, each, colour, marker(index), top)
    sizes = np.concatenate([each.parameters for each in slices])
    log_axis(axes.xaxis, sizes.min() * 0.8, sizes.max() * 1.25)
    log_axis(axes.yaxis, lowest * 0.97, top * 1.03)
    _over_parameters(figure, axes, analysis)
    return True


def budgets(curves: Sequence[Curve]) -> np.ndarray:
    """PFLOPs, float64 (SLICES,), log-spaced over the range that three sizes have in common; (0,) if there is none."""
    spent = np.sort(np.concatenate([curve.pflops for curve in curves])) if curves else np.empty(0)
    reached = np.zeros(spent.shape, int)
    for size in {curve.parameters for curve in curves}:
        of_size = [curve for curve in curves if curve.parameters == size]
        inside = [(spent >= curve.pflops[0]) & (spent <= curve.pflops[-1]) for curve in of_size]
        reached += np.logical_or.reduce(inside)
    shared = spent[reached >= LEAST_SIZES]
    return np.geomspace(shared[0], shared[-1], SLICES) if shared.size else shared


def _slice(axes: Axes, each: Slice, colour: str, mark: str, top: float) -> None:
    visible = each.loss <= top
    text = f"C = {significant(each.pflops, 2)} PFLOPs"
    if each.best_parameters is not None and each.best_loss is not None:
        text += f", N* = {count(each.best_parameters, 2)}"
        place = np.geomspace(each.parameters.min(), each.parameters.max(), 100)
        loss = each.best_loss * np.exp(each.curvature * np.log(place / each.best_parameters) ** 2)
        axes.plot(place[loss <= top], loss[loss <= top], color=colour, linewidth=0.9)
        axes.plot(each.best_parameters, each.best_loss, "*", color=colour, mec="black", mew=0.5, markersize=8, zorder=5)
    else:
        axes.plot(each.parameters[visible], each.loss[visible], ":", color=colour, linewidth=0.9)
    axes.plot(each.parameters[visible], each.loss[visible], mark, color=colour, markersize=4, zorder=4)
    axes.plot([], [], mark, color=colour, markersize=4, label=text)


# Residuals.


RESIDUALS = (
    "Residuals, 100·log(observed / law). A law of the wrong form leaves a pattern here, which no correlation "
    "coefficient shows."
)
PANELS = {
    PARAMETER_LAWS: PARAMETERS,
    ("power_law_of_compute", "saturating_power_law_of_compute"): f"{SHORT_COMPUTE}, annealed frontier",
    ("power_law_of_compute_whole", "saturating_power_law_of_compute_whole"): f"{SHORT_COMPUTE}, whole frontier",
    (PARAMETERS_AND_DATA,): f"{PARAMETERS} (of every training)",
}
"""Axis labels by the laws of a panel; the whole frontier only if there is no law of the annealed one."""


def draw_residuals(figure: Figure, study: Study, analysis: Analysis, extrapolate: float) -> bool:
    """Draw on an empty figure; False if there is no law."""
    panels = [([name for name in names if name in analysis.diagnostics], label) for names, label in PANELS.items()]
    if {"power_law_of_compute", "saturating_power_law_of_compute"} & analysis.diagnostics.keys():
        panels = [panel for panel in panels if "whole" not in panel[1]]
    panels = [panel for panel in panels if panel[0]]
    if not panels:
        return False
    figure.set_size_inches(figure.get_figwidth(), 0.3 + 1.4 * len(panels))
    for axes, (names, label) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _panel(axes, analysis, names, label)
    figure.supylabel("residual of log loss (%)", fontsize=8)
    return True


def _panel(axes: Axes, analysis: Analysis, names: list[str], label: str) -> None:
    residuals = {name: analysis.diagnostics[name].residuals for name in names}
    places = [residual.x[0] for each in residuals.values() for residual in each]
    largest = max(abs(residual.log_residual) for each in residuals.values() for residual in each)
    axes.axhline(0, color="0.3", linewidth=0.7)
    for index, (name, each) in enumerate(residuals.items()):
        points = sorted((residual.x[0], 100 * residual.log_residual) for residual in each)
        kind = 2 if name == PARAMETERS_AND_DATA else index
        style = {"color": COLOURS[kind], "mfc": "none" if index else None, "markersize": 4, "markeredgewidth": 1}
        axes.plot(*zip(*points, strict=True), marker(kind), label=SHORT[name], **style)
    log_axis(axes.xaxis, min(places) * 0.8, max(places) * 1.25)
    if label.startswith(PARAMETERS):
        number_parameters(axes.xaxis)
    axes.set_ylim(-150 * max(largest, 1e-6), 150 * max(largest, 1e-6))
    axes.set_xlabel(label)
    axes.legend(loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.3), handletextpad=0.2)
    tidy(axes)
