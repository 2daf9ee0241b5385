"""The rate-distortion plot of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from hpcm_scale.evaluation.bd_rate import RateCurve
from hpcm_scale.evaluation.curves import ESTIMATED, Curve, Results
from hpcm_scale.formatting import label, new_figure, save, tidy

PANELS = {"psnr": "mean PSNR (dB), RGB, 8 bits", "ms_ssim_db": "MS-SSIM, mean in dB"}
MARKERS = "osD^vP*Xph"
CHARACTERS, MARGIN = 11, 6
"""Of a legend: characters per inch, and the width of marker and gap in characters."""


def draw_rate_distortion(results: Results, path: str | Path) -> None:
    """Draw mean PSNR and MS-SSIM in dB, if every image has them, against mean bpp: one line per codec.

    Points that others measured are dashed. The suffix of `path` sets the format, for example .png, .pdf or .svg.
    """
    panels = [key for key in PANELS if all(point.mean[key] is not None for _, point in results.points())]
    rates = [point.mean["bpp"] for _, point in results.points()] + [rate for each in results.given for rate in each.bpp]
    highest = max(filter(math.isfinite, rates), default=1) * (2 if len(rates) == 1 else 1.05)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    with new_figure(figsize=(1 + 5.5 * len(panels), 5.2), dpi=150, layout=layout) as figure:
        colours = styles([*results.curves, *results.given])
        for axes, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for curve, style in zip(results.curves, colours, strict=False):
                draw_curve(axes, curve, [point.mean[key] for point in curve.points], *style)
            for curve, style in zip(results.given, colours[len(results.curves) :], strict=True):
                draw_given(axes, curve, key, *style)
            dress(axes, PANELS[key])
            axes.set_xlim(0, highest)
        figure.suptitle(f"Rate and distortion: {label(results.title)}", fontweight="bold")
        legend(figure)
        save(figure, path)


def styles(curves: Sequence[Curve | RateCurve]) -> list[tuple[str, str]]:
    """A colour and a marker for each curve; the first 100 pairs differ."""
    colours = [*map(to_hex, matplotlib.color_sequences["petroff10"])]  # safe for colour-blind readers
    return [(colours[i % len(colours)], MARKERS[(i + i // len(colours)) % len(MARKERS)]) for i in range(len(curves))]


def draw_curve(
    axes: Axes, curve: Curve, heights: list[float], colour: str, marker: str, *, filled: bool = True
) -> None:
    """Draw `heights`, one per point, over mean bpp; models heavier than baselines, markers hollow unless `filled`."""
    is_model = any(point.weights for point in curve.points)
    rates = [point.mean["bpp"] for point in curve.points]
    text = label(curve.label)
    if len(curve.points) == 1:
        text += f", {label(curve.points[0].setting)}"
    if curve.rate == ESTIMATED:
        text += " (estimated rate)"
    style = {"linewidth": 2.2, "markersize": 7, "zorder": 3} if is_model else {"linewidth": 1.4, "markersize": 5}
    if not filled:
        style |= {"markerfacecolor": "white", "markeredgewidth": 1.6}
    line = "-" if len(curve.points) > 1 else ""
    axes.plot(rates, heights, color=colour, linestyle=line, marker=marker, label=text, clip_on=False, **style)


def draw_given(axes: Axes, curve: RateCurve, key: str, colour: str, marker: str) -> None:
    """Draw the points of another evaluation, if they have the measure, a key of `PANELS`."""
    metric = {"psnr": "psnr", "ms_ssim_db": "ms-ssim"}[key]
    if (curve.psnr if metric == "psnr" else curve.ms_ssim) is not None:
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.4, "linestyle": "--"}
        axes.plot(
            curve.bpp, curve.quality(metric), label=f"{label(curve.label)} ({curve.rate})", clip_on=False, **style
        )


def legend(figure: Figure) -> None:
    """A legend of the lines of all axes, markers filled, below them; with as many columns as fit."""
    handles: dict[str, Line2D] = {}
    for axes in figure.axes:
        for line in axes.get_lines():
            handles.setdefault(str(line.get_label()), copy(line)).set_markerfacecolor(line.get_color())
    room = figure.get_figwidth() * CHARACTERS / (MARGIN + max(map(len, handles)))
    columns = max(1, min(len(handles), int(room)))
    figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=columns, frameon=False)


def dress(axes: Axes, quality: str) -> None:
    """Label the axes, rate on x, and draw a grid."""
    axes.set_xlabel("mean rate (bits per pixel)")
    axes.set_ylabel(quality)
    tidy(axes)
