"""The rate-distortion plot of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpcm_scale.drawing import label, new_figure, save
from hpcm_scale.evaluation.curves import ESTIMATED, Curve
from hpcm_scale.evaluation.results import Results

PANELS = {"psnr": "mean PSNR (dB), RGB, 8 bits", "ms_ssim_db": "MS-SSIM, mean in dB"}
MARKERS = "osD^vP*Xph"
CHARACTERS, MARGIN = 11, 6
"""Of a legend: how many go into an inch, and the width of marker and gap in characters."""


def draw_rate_distortion(results: Results, path: str | Path) -> None:
    """Draw mean PSNR, and the dB of the mean MS-SSIM where every image has it, against mean bpp: one line per codec.

    The format follows the suffix of `path`, for example .png, .pdf or .svg.
    """
    panels = [key for key in PANELS if all(point.mean[key] is not None for _, point in results.points())]
    highest = max(point.mean["bpp"] for _, point in results.points())
    alone = len(list(results.points())) == 1
    with new_figure(figsize=(1 + 5.5 * len(panels), 5.2), dpi=150, layout="constrained") as figure:
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        colours = styles(results.curves)
        for axes, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for curve, style in zip(results.curves, colours, strict=True):
                draw_curve(axes, curve, [point.mean[key] for point in curve.points], *style)
            dress(axes, PANELS[key])
            axes.set_xlim(0, highest * (2 if alone else 1.05))
        figure.suptitle(f"Rate and distortion: {label(results.title)}", fontweight="bold")
        legend(figure, *figure.axes[0].get_legend_handles_labels())
        save(figure, path)


def styles(curves: list[Curve]) -> list[tuple[str, str]]:
    """A colour and a marker for each curve, no two the same up to many more than can be read."""
    colours = matplotlib.color_sequences["petroff10"]  # told apart by colour-blind readers
    return [(colours[i % len(colours)], MARKERS[(i + i // len(colours)) % len(MARKERS)]) for i in range(len(curves))]


def draw_curve(
    axes: Axes, curve: Curve, heights: list[float], colour: str, marker: str, *, filled: bool = True
) -> None:
    """Draw `heights`, one per point, over mean bpp; ours heavier than others, markers hollow unless `filled`."""
    ours = any(point.weights for point in curve.points)
    rates = [point.mean["bpp"] for point in curve.points]
    text = label(curve.label)
    if len(curve.points) == 1:
        text += f", {label(curve.points[0].setting)}"
    if curve.rate == ESTIMATED:
        text += " (estimated rate)"
    style = {"linewidth": 2.2, "markersize": 7, "zorder": 3} if ours else {"linewidth": 1.4, "markersize": 5}
    if not filled:
        style |= {"markerfacecolor": "white", "markeredgewidth": 1.6}
    line = "-" if len(curve.points) > 1 else ""
    axes.plot(rates, heights, color=colour, linestyle=line, marker=marker, label=text, clip_on=False, **style)


def legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """A legend below the axes, in as many columns as the longest label leaves room for."""
    room = figure.get_figwidth() * CHARACTERS / (MARGIN + max(map(len, labels)))
    columns = max(1, min(len(labels), int(room)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def dress(axes: Axes, quality: str) -> None:
    """Name the axes, rate on x, and draw a grid behind the curves."""
    axes.set_xlabel("mean rate (bits per pixel)")
    axes.set_ylabel(quality)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
