"""Loss against parameters: what was observed, every law through it, and how far it may be off further out."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpcm_scale.scaling.analysis import PARAMETER_LAWS, Analysis
from hpcm_scale.scaling.figures.style import COLOURS, log_axis, over_parameters, ribbon
from hpcm_scale.scaling.laws.law import Law
from hpcm_scale.scaling.observations import Study
from hpcm_scale.scaling.wording import SHORT, count, significant

CAPTION = (
    "Loss at the end of training against parameters. Filled: the trainings that the laws of parameters are fitted to; "
    "hollow: the others. Lines: the laws, with the prediction interval for one new training as a ribbon where "
    "that is within a factor of 1.5; right of the dotted line nothing was observed. The joint law is drawn for the "
    "most training pixels D among its runs."
)
LAWS = {"power_law_of_parameters": "--", "floor_of_parameters": "-", "joint": "-."}


def draw(figure: Figure, study: Study, analysis: Analysis, extrapolate: float) -> bool:
    """Draw on an empty figure; False where there is one size only. Laws with an exponent at its edge are left out."""
    sizes = [point.parameters for point in analysis.observations]
    if len(set(sizes)) < 2:
        return False
    figure.set_size_inches(figure.get_figwidth(), 3.1)
    axes = figure.add_subplot()
    losses = [point.loss for point in analysis.observations]
    laws = [law for name in LAWS if (law := analysis.laws.get(name)) and not law.at_edge]
    end = max(sizes) * (extrapolate if laws else 1)
    bounds = [min(losses) * 0.97, max(losses) * 1.02]
    for law in laws:
        low, high = _line(axes, law, np.geomspace(law.observed["N"][0] * 0.9, end, 200), analysis)
        bounds[0] = min(bounds[0], max(low, 0.7 * min(losses)) * 0.98)
        bounds[1] = max(bounds[1], min(high, 1.3 * max(losses)) * 1.01)
    _points(axes, analysis)
    floor = analysis.laws.get("floor_of_parameters")
    if floor in laws and floor.parameters["E"] > bounds[0]:
        level = floor.parameters["E"]
        label = f"floor E = {significant(level, 3)}"
        axes.axhline(level, color=COLOURS[1], linewidth=0.8, linestyle=":", label=label)
    if end > max(sizes):
        axes.axvline(max(sizes) * 1.12, color="0.55", linewidth=0.8, linestyle=":", zorder=1)
    log_axis(axes.xaxis, min(sizes) * 0.75, end * 1.1)
    log_axis(axes.yaxis, *bounds)
    over_parameters(figure, axes, analysis)
    return True


def _line(axes: Axes, law: Law, sizes: np.ndarray, analysis: Analysis) -> tuple[float, float]:
    """Draw a law; returns the lowest and the highest loss of its line and ribbon."""
    colour = COLOURS[list(LAWS).index(law.name)]
    pixels = law.observed["D"][1] if "D" in law.observed else None
    expected = law.predict(sizes if pixels is None else (sizes, np.full_like(sizes, pixels)), analysis.level)
    label = SHORT[law.name] if pixels is None else f"{SHORT[law.name]}, D = {count(pixels)}px"
    if law.name == analysis.preferred.get("parameters"):
        label += " (preferred)"
    axes.plot(sizes, expected.value, LAWS[law.name], color=colour, label=label, zorder=3)
    tells = ribbon(axes, sizes, expected, color=colour, alpha=0.14, zorder=2)
    edges = [np.where(tells, edge, np.nan) for edge in (expected.low, expected.high)]
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
