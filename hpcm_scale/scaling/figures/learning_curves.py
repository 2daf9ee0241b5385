"""Loss of every run against compute, both frontiers, and the law of the annealed one."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpcm_scale.formatting import label
from hpcm_scale.scaling.analysis import Analysis
from hpcm_scale.scaling.figures.style import SHORT_COMPUTE, calm, column, log_axis, loss_label, ribbon, size_styles
from hpcm_scale.scaling.laws.law import Law
from hpcm_scale.scaling.observations import Study
from hpcm_scale.scaling.verdict import compute_law
from hpcm_scale.scaling.wording import SHORT, count

CAPTION = (
    "Loss of every run against cumulative training compute, smoothed. Grey steps: the whole frontier, the lowest "
    "smoothed loss up to each compute, annealed or not. Marks ringed in black: the annealed frontier, to which the law "
    "is fitted where there is one; dashed, with the prediction interval for one new training where that is within a "
    "factor of 1.5, it goes on beyond what was observed."
)


def draw(figure: Figure, study: Study, analysis: Analysis, extrapolate: float) -> bool:
    """Draw on an empty figure; False where no run has a curve."""
    if not study.curves:
        return False
    figure.set_size_inches(figure.get_figwidth(), 3.6)
    axes = figure.add_subplot()
    sizes = {curve.model: curve.parameters for curve in study.curves}
    styles = size_styles(sizes)
    law = compute_law(analysis)
    bottom, top = _loss_range(study, analysis)
    for curve in study.curves:
        shown = curve.smoothed <= top
        colour, _ = styles[curve.model]
        alone = "." if shown.sum() == 1 else None  # one point makes no line
        line = {"color": colour, "linewidth": 0.8, "alpha": 0.75, "marker": alone, "zorder": 3}
        axes.plot(curve.pflops[shown], curve.smoothed[shown], **line)
    left = min((line.get_xdata()[0] for line in axes.lines if len(line.get_xdata())), default=1e-6)
    right = max(curve.pflops[-1] for curve in study.curves)
    _frontiers(axes, analysis, styles, top)
    if law is not None:
        bottom, right = _law(axes, law, analysis.level, extrapolate, bottom)
    log_axis(axes.xaxis, left * 0.9, right * 1.1, 7)
    log_axis(axes.yaxis, bottom * 0.98, top * 1.02, 7)
    axes.set_xlabel(SHORT_COMPUTE)
    axes.set_ylabel(loss_label(analysis))
    calm(axes)
    handles = []
    for model in sorted(sizes, key=sizes.__getitem__):
        colour, mark = styles[model]
        text = f"{label(model)} ({count(sizes[model])})"
        handles += axes.plot([], [], color=colour, marker=mark, markersize=4, label=text)
    known, _ = axes.get_legend_handles_labels()
    column(figure, [*handles, *[handle for handle in known if handle not in handles]])
    return True


def _loss_range(study: Study, analysis: Analysis) -> tuple[float, float]:
    """Lowest smoothed loss, and the highest that tells something: a run's first part falls manyfold."""
    lowest = min(curve.smoothed.min() for curve in study.curves)
    ends = [curve.smoothed[-1] for curve in study.curves]
    early = [np.interp(0.15 * curve.pflops[-1], curve.pflops, curve.smoothed) for curve in study.curves]
    annealed = [point.loss for point in analysis.frontier_annealed]
    return float(lowest), float(max(max(ends), min(max(early), 1.25 * max(ends)), *annealed, 1.05 * lowest) * 1.02)


def _frontiers(axes: Axes, analysis: Analysis, styles: dict[str, tuple[str, str]], top: float) -> None:
    whole = [point for point in analysis.frontier if point.loss <= top]
    if whole:
        line = [(point.pflops, point.loss) for point in whole]
        axes.plot(*zip(*line, strict=True), color="0.62", linewidth=2.6, drawstyle="steps-post", label="whole frontier")
    for point in analysis.frontier_annealed:
        colour, mark = styles[point.model]
        axes.plot(point.pflops, point.loss, mark, color=colour, markeredgecolor="black", markersize=5, zorder=5)
    if analysis.frontier_annealed:
        axes.plot([], [], "o", color="white", markeredgecolor="black", markersize=5, label="annealed frontier")


def _law(axes: Axes, law: Law, level: float, extrapolate: float, bottom: float) -> tuple[float, float]:
    """Draw a law of compute and its interval; returns the lowest loss and the largest compute to show."""
    low, high = law.observed["C"]
    compute = np.geomspace(low, high * extrapolate, 200)
    expected = law.predict(compute, level)
    axes.plot(compute, expected.value, "--", color="black", linewidth=1.1, zorder=4, label=f"law: {SHORT[law.name]}")
    tells = ribbon(axes, compute, expected, color="black", alpha=0.09, label=f"{level * 100:g} % of new trainings")
    if tells.any():
        bottom = min(bottom, max(float(expected.low[tells].min()), 0.6 * bottom))
    return min(bottom, float(expected.value.min())), compute[-1]
