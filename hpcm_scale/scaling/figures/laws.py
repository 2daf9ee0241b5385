"""Figures of the laws: loss against parameters, slices at equal compute, residuals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpcm_scale.formatting import count, significant, tidy
from hpcm_scale.scaling.analysis import (
    COMPUTE_LAWS,
    COMPUTE_OPTIMAL,
    PARAMETER_LAWS,
    PARAMETERS_AND_DATA,
    SHORT,
    Analysis,
)
from hpcm_scale.scaling.figures.style import (
    COLOURS,
    COMPUTE,
    MARKERS,
    OUTLIER,
    PARAMETERS,
    band,
    colours,
    count_axis,
    log_axis,
    loss_label,
    note_outside,
    ordinary,
)
from hpcm_scale.scaling.fit_data import losses_at
from hpcm_scale.scaling.laws.compute_optimal import PFLOP, ComputeOptimal
from hpcm_scale.scaling.observations import Curve, Study

# Loss against parameters.


LOSS_AGAINST_PARAMETERS = (
    "Loss at the end of training against parameters. Filled: the trainings to which the laws of parameters are fitted; "
    "hollow: the others, with another amount of data or a learning rate that has not decayed. Lines: the laws; shaded: "
    "the prediction interval of one new training, which needs no choice between them."
)


def draw_loss_against_parameters(figure: Figure, study: Study, analysis: Analysis, extrapolate: float) -> bool:
    """Draw on an empty figure; False if there is one size only."""
    trained = np.array([(point.parameters, point.loss) for point in analysis.observations], float).reshape(-1, 2)
    if len(set(trained[:, 0])) < 2:
        return False
    figure.set_size_inches(figure.get_figwidth(), 3.1)
    axes = figure.add_subplot()
    usual = trained[ordinary(trained[:, 1]), 1]
    bottom, top, end = usual.min(), usual.max(), trained[:, 0].max()
    used = set()
    if law := analysis.laws.get(PARAMETER_LAWS[0]):
        used, end = set(law.runs), end * extrapolate
        sizes = np.geomspace(law.observed["N"][0] * 0.9, end, 200)
        expected = analysis.at_size(sizes)
        for name, line, colour in zip(PARAMETER_LAWS, ("--", "-"), COLOURS, strict=False):
            if name in analysis.laws:
                loss = analysis.laws[name].predict(sizes, analysis.level).value
                bottom = min(bottom, max(loss.min(), 0.6 * bottom))
                axes.plot(sizes, loss, line, color=colour, label=SHORT[name], zorder=3)
        band(axes, sizes, expected, color="0.85", label=f"{analysis.level * 100:g} % of new trainings", zorder=1)
        bottom = max(np.nanmin([*expected.low, bottom]), 0.8 * bottom)
        top = min(np.nanmax([*expected.high, top]), 1.2 * top)
    saturating = analysis.laws.get(PARAMETER_LAWS[1])
    if saturating and 0.6 * bottom < (level := saturating.parameters["E"]) < top:
        bottom = min(bottom, level)
        text = f"irreducible loss E = {significant(level, 3)}"
        axes.axhline(level, color=COLOURS[1], linewidth=0.8, linestyle=":", label=text)
    for fitted, colour, face in ((True, "black", "black"), (False, "0.45", "none")):
        points = trained[[(point.run in used) == fitted for point in analysis.observations]]
        if points.size:
            text = "fitted trainings" if fitted else "other trainings"
            style = {"markersize": 4, "markeredgewidth": 0.8, "markerfacecolor": face, "zorder": 4 + fitted}
            axes.plot(*points.T, "o", color=colour, label=text, **style)
    log_axis(axes.yaxis, bottom * 0.97, top * 1.03)
    axes.set_ylabel(loss_label(analysis))
    count_axis(axes, trained[:, 0].min() * 0.75, end * 1.1, PARAMETERS)
    note_outside(axes, np.sum(trained[:, 1] > top * 1.03), "training")
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=2)
    return True


# Slices at equal compute.


ISOFLOP = (
    "Loss against parameters at equal training compute C. Markers: the lowest smoothed loss of each size, interpolated "
    "between the lines of its runs; filled if the learning rate has decayed there, hollow, and therefore higher, if "
    "not. Lines and stars, if there is an L(N, D): its slice at C, dotted outside the observed amounts of data, and "
    "its minimum N*. Without one, thin lines join the markers."
)
SLICES = 5
LEAST_SIZES = 3
APART = 1.25
"""Least ratio of the compute of two slices."""


def draw_isoflop(figure: Figure, study: Study, analysis: Analysis, extrapolate: float) -> bool:
    """Draw on an empty figure; False if no three sizes have a compute budget in common."""
    chosen = budgets(study.curves)
    if not chosen:
        return False
    figure.set_size_inches(figure.get_figwidth(), 3.4)
    axes = figure.add_subplot()
    law = analysis.laws.get(COMPUTE_OPTIMAL)
    raw = [np.array(losses_at(study.curves, pflops)) for pflops in chosen]
    every = np.concatenate(raw)
    low, high = every[:, 0].min(), every[:, 0].max()
    if isinstance(law, ComputeOptimal):
        best = np.asarray(law.optimum(np.array(chosen)).parameters)
        low, high = min(low, max(best.min(), low / 10)), max(high, min(best.max(), high * 10))
    low, high = low * 0.8, high * 1.25
    losses = every[ordinary(every[:, 1]), 1]
    for pflops, points, colour, mark in zip(chosen, raw, colours(len(chosen), ordered=True), MARKERS, strict=False):
        text = significant(pflops, 2)
        if isinstance(law, ComputeOptimal):
            losses = np.append(losses, law.predict(pflops).value)
            text += f": N* = {count(law.optimum(pflops).parameters, 2)}"
            _slice(axes, analysis, law, pflops, np.geomspace(low, high, 200), colour)
        else:
            axes.plot(points[:, 0], points[:, 1], color=colour, linewidth=0.6)
        style = {"marker": mark, "color": colour, "markersize": 4, "zorder": 4}
        for filled in (True, False):
            size, loss, _ = points[points[:, 2] == filled].T
            axes.plot(size, loss, linestyle="", mfc=colour if filled else "white", **style)
        axes.plot([], [], label=text, **style)
    lowest, top = losses.min(), min(losses.max(), OUTLIER * losses.min())
    count_axis(axes, low, high, PARAMETERS)
    log_axis(axes.yaxis, lowest * 0.97, top * 1.03)
    axes.set_ylabel(loss_label(analysis))
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=2, title=COMPUTE)
    return True


def budgets(curves: Sequence[Curve]) -> list[float]:
    """PFLOPs of up to SLICES slices, ascending, which LEAST_SIZES sizes reach.

    They are those at the ends of annealed runs, if any are annealed: the losses that L(N, D) predicts.
    """
    ends = sorted({float(curve.pflops[-1]) for curve in curves if curve.annealed[-1]})
    ends = ends or sorted({float(curve.pflops[-1]) for curve in curves})
    shared = np.array([each for each in ends if len(losses_at(curves, each)) >= LEAST_SIZES])
    chosen: list[float] = []
    for target in np.geomspace(shared[0], shared[-1], SLICES) if shared.size else ():
        nearest = float(shared[np.argmin(np.abs(np.log(shared / target)))])
        if not chosen or nearest > APART * chosen[-1]:
            chosen.append(nearest)
    return chosen


def _slice(axes: Axes, analysis: Analysis, law: ComputeOptimal, pflops: float, sizes: np.ndarray, colour: str) -> None:
    """Draw L(N, D) of `sizes`, float64 (n,), where D is what the compute affords."""
    pixels = PFLOP * pflops / (law.parameters["k"] * sizes ** law.parameters["kappa"])
    loss = analysis.laws[PARAMETERS_AND_DATA].predict((sizes, pixels)).value
    least, most = law.observed["D"]
    inside = (pixels >= least) & (pixels <= most)
    axes.plot(sizes, loss, ":", color=colour, linewidth=0.8)
    axes.plot(sizes[inside], loss[inside], color=colour, linewidth=1.1)
    best = law.optimum(pflops).parameters
    axes.plot(best, law.predict(pflops).value, "*", color=colour, mec="black", mew=0.5, markersize=8, zorder=5)


# Residuals.


RESIDUALS = (
    "Residuals, 100·log(observed / law), of the laws of one variable (top) and of L(N, D) (bottom, over each of its "
    "variables). A law of the wrong form leaves a pattern here, which no correlation coefficient shows."
)
JOINT = (PARAMETERS_AND_DATA,)
PANELS = {"N": (PARAMETER_LAWS, 0), "C": (COMPUTE_LAWS, 0), "N of L(N, D)": (JOINT, 0), "D of L(N, D)": (JOINT, 1)}
"""Laws of a panel and index of the variable on its x axis."""


def draw_residuals(figure: Figure, study: Study, analysis: Analysis, extrapolate: float) -> bool:
    """Draw on an empty figure; False if there is no law."""
    names = [name for name, (laws, _) in PANELS.items() if analysis.diagnostics.keys() & set(laws)]
    if not names:
        return False
    single, joint = ([name for name in names if ("of" in name) == of_both] for of_both in (False, True))
    rows: Any = [row * (2 // len(row)) for row in (single, joint) if row]  # a panel alone has the whole width
    figure.set_size_inches(figure.get_figwidth(), 0.5 + 1.5 * len(rows))
    for name, axes in figure.subplot_mosaic(rows).items():
        laws, variable = PANELS[name]
        _panel(axes, analysis, [law for law in laws if law in analysis.diagnostics], variable)
    figure.supylabel("residual of log loss (%)", fontsize=8)
    known = {text: each for axes in figure.axes for each, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles=list(known.values()), loc="outside lower center", ncols=3)
    return True


def _panel(axes: Axes, analysis: Analysis, laws: list[str], variable: int) -> None:
    residuals = {name: analysis.diagnostics[name].residuals for name in laws}
    places = [residual.x[variable] for each in residuals.values() for residual in each]
    sizes = [100 * abs(residual.log_residual) for each in residuals.values() for residual in each]
    axes.axhline(0, color="0.3", linewidth=0.7)
    for name, each in residuals.items():
        kind = 2 if name == PARAMETERS_AND_DATA else (*PARAMETER_LAWS, *COMPUTE_LAWS).index(name) % 2
        points = sorted((residual.x[variable], 100 * residual.log_residual) for residual in each)
        style = {"color": COLOURS[kind], "mfc": None if kind == 0 else "none", "markersize": 3.5}
        axes.plot(*zip(*points, strict=True), MARKERS[kind], label=SHORT[name], **style)
    low, high = min(places) * 0.7, max(places) * 1.4
    observed = tuple(analysis.laws[laws[0]].observed)[variable]
    if observed == "C":
        log_axis(axes.xaxis, low, high, 4)
        axes.set_xlabel("compute C (PFLOPs)")
    else:
        count_axis(axes, low, high, {"N": PARAMETERS, "D": "training pixels D"}[observed], 4)
    largest = max(1e-4, min(max(sizes), 10 * float(np.median(sizes)) or max(sizes)))
    axes.set_ylim(-1.2 * largest, 1.2 * largest)
    note_outside(axes, sum(size > 1.2 * largest for size in sizes), "training")
    tidy(axes)
