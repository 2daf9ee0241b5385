"""How far every point lies from every law."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpcm_scale.scaling.analysis import Analysis
from hpcm_scale.scaling.figures.style import (
    COLOURS,
    PARAMETERS,
    SHORT_COMPUTE,
    calm,
    log_axis,
    marker,
    number_parameters,
)
from hpcm_scale.scaling.observations import Study
from hpcm_scale.scaling.wording import SHORT

CAPTION = (
    "Residuals, 100·log(observed / law): a law that bends where the points do not leaves a pattern here, which no "
    "correlation coefficient shows."
)
PANELS = {
    ("power_law_of_parameters", "floor_of_parameters"): PARAMETERS,
    ("power_law_of_compute", "floor_of_compute"): f"{SHORT_COMPUTE}, annealed frontier",
    ("power_law_of_compute_whole", "floor_of_compute_whole"): f"{SHORT_COMPUTE}, whole frontier",
    ("joint",): f"{PARAMETERS} (of every training)",
}
"""Laws by what their first variable is; the whole frontier only where there is no law of the annealed one."""


def draw(figure: Figure, study: Study, analysis: Analysis, extrapolate: float) -> bool:
    """Draw on an empty figure; False where there is no law."""
    panels = [([name for name in names if name in analysis.trust], label) for names, label in PANELS.items()]
    if {"power_law_of_compute", "floor_of_compute"} & analysis.trust.keys():
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
    places = [residual.x[0] for name in names for residual in analysis.trust[name].residuals]
    largest = max(abs(residual.log_residual) for name in names for residual in analysis.trust[name].residuals)
    axes.axhline(0, color="0.3", linewidth=0.7)
    for index, name in enumerate(names):
        points = [(residual.x[0], 100 * residual.log_residual) for residual in analysis.trust[name].residuals]
        style = {"color": COLOURS[index if name != "joint" else 2], "mfc": "none" if index else None}
        mark = marker(index if name != "joint" else 2)
        axes.plot(*zip(*sorted(points), strict=True), mark, markersize=4, markeredgewidth=1, label=SHORT[name], **style)
    log_axis(axes.xaxis, min(places) * 0.8, max(places) * 1.25)
    if label.startswith(PARAMETERS):
        number_parameters(axes.xaxis)
    axes.set_ylim(-150 * max(largest, 1e-6), 150 * max(largest, 1e-6))
    axes.set_xlabel(label)
    axes.legend(loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.3), handletextpad=0.2)
    calm(axes)
