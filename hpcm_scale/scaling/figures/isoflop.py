"""Slices through all runs at equal compute: which size is best there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpcm_scale.scaling.analysis import Analysis
from hpcm_scale.scaling.figures.style import colours, log_axis, marker, over_parameters
from hpcm_scale.scaling.frontier import Slice, isoflop_slices
from hpcm_scale.scaling.observations import Curve, Study
from hpcm_scale.scaling.wording import count, significant

CAPTION = (
    "Loss against parameters at equal training compute, from the smoothed curves of all runs, annealed or not. Lines: "
    "parabolas in log N; a star where the lowest loss lies between sizes that were trained, no star where it does not."
)
SLICES = 5
LEAST_SIZES = 3


def draw(figure: Figure, study: Study, analysis: Analysis, extrapolate: float) -> bool:
    """Draw on an empty figure; False where no amount of compute was spent on three sizes."""
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
    over_parameters(figure, axes, analysis)
    return True


def budgets(curves: Sequence[Curve]) -> np.ndarray:
    """PFLOPs, evenly over the logarithm, from the least to the most that three sizes have spent."""
    spent = np.sort(np.concatenate([curve.pflops for curve in curves])) if curves else np.empty(0)
    sizes = {curve.parameters for curve in curves}
    reached = np.zeros(spent.shape, int)
    for size in sizes:
        of_size = [curve for curve in curves if curve.parameters == size]
        inside = [(spent >= curve.pflops[0]) & (spent <= curve.pflops[-1]) for curve in of_size]
        reached += np.logical_or.reduce(inside)
    shared = spent[reached >= LEAST_SIZES]
    return np.geomspace(shared[0], shared[-1], SLICES) if shared.size else shared


def _slice(axes: Axes, each: Slice, colour: str, mark: str, top: float) -> None:
    shown = each.loss <= top
    label = f"C = {significant(each.pflops, 2)} PFLOPs"
    if each.best_parameters is not None and each.best_loss is not None:
        label += f", N* = {count(each.best_parameters, 2)}"
        place = np.geomspace(each.parameters.min(), each.parameters.max(), 100)
        loss = each.best_loss * np.exp(each.curvature * np.log(place / each.best_parameters) ** 2)
        axes.plot(place[loss <= top], loss[loss <= top], color=colour, linewidth=0.9)
        axes.plot(each.best_parameters, each.best_loss, "*", color=colour, mec="black", mew=0.5, markersize=8, zorder=5)
    else:
        axes.plot(each.parameters[shown], each.loss[shown], ":", color=colour, linewidth=0.9)
    axes.plot(each.parameters[shown], each.loss[shown], mark, color=colour, markersize=4, zorder=4)
    axes.plot([], [], mark, color=colour, markersize=4, label=label)
