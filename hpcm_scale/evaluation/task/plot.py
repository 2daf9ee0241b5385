"""The plot of a task evaluation: a panel per set of images, receiver and metric."""

from __future__ import annotations

import math
from copy import copy
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from hpcm_scale.drawing import label, new_figure, save
from hpcm_scale.evaluation.curves import Curve
from hpcm_scale.evaluation.rate_distortion_plot import draw_curve, dress, legend, styles
from hpcm_scale.evaluation.task.bd_rates import qualities
from hpcm_scale.evaluation.task.metrics import Metric, TaskMeasure
from hpcm_scale.evaluation.task.sections import Section, TaskResults, trained_on

COLUMNS = 4
"""Panels beside each other, at most: what one receiver with classes is measured in."""
TICKS = (1, 1.5, 2, 3, 4, 5, 7)
"""Of each decade of rate: some lie within any range that codecs span."""
WIDTH = 50
"""Characters of a panel's title in a line."""


def draw_tasks(results: TaskResults, path: str | Path) -> None:
    """Draw every metric that has a scale against mean bpp: more is better everywhere.

    The rate is logarithmic, for what is compared is its ratio: equal distances are equal savings.
    Markers are hollow where the codec was trained on the receiver of the panel. What a receiver makes of uncoded
    pictures is a dashed line. The format follows the suffix of `path`.
    """
    panels = [(*each, metric) for each in results.measured for metric in each[1].compared()]
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (1 + 4.6 * columns, 1.2 + 4.3 * rows)
    with new_figure(figsize=size, dpi=120, layout="constrained") as figure:
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        places = list(figure.subplots(rows, columns, squeeze=False).flat)
        handles: dict[str, Line2D] = {}
        for axes, (section, measure, metric) in zip(places, panels, strict=False):
            _draw_panel(axes, section, measure, metric)
            for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(text, copy(handle)).set_markerfacecolor(handle.get_color())  # filled
        for axes in places[len(panels) :]:
            axes.set_visible(False)
        hollow = any(
            trained_on(curve, each.receiver) for section, each in results.measured for curve in _curves(section)
        )
        note = "; hollow markers: trained on the receiver of the panel" if hollow else ""
        figure.suptitle(f"Rate and task quality: more is better{note}", fontweight="bold")
        legend(figure, [*handles.values()], [*handles])
        save(figure, path)


def _draw_panel(axes: Axes, section: Section, measure: TaskMeasure, metric: Metric) -> None:
    curves = _curves(section)
    for curve, style in zip(curves, styles(curves), strict=True):
        heights = qualities(section, measure, metric, curve)
        draw_curve(axes, curve, heights, *style, filled=not trained_on(curve, measure.receiver))
    uncoded = section.originals[section.measures.index(measure)].get(metric.key)
    if uncoded is not None:
        axes.axhline(metric.quality(uncoded), color="0.4", linestyle="--", linewidth=1.2, label="uncoded pictures")
    dress(axes, f"{metric.scale.name} ({metric.scale.unit})")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    seen = [curve.label for curve in curves if trained_on(curve, measure.receiver)]
    known = f"seen in training by {', '.join(map(label, seen))}" if seen else "unseen in training"
    lines = (f"{label(measure.receiver)}: {known}", label(section.results.title))
    axes.set_title("\n".join(fill(line, WIDTH) for line in lines), fontsize=10)


def _curves(section: Section) -> list[Curve]:
    return section.results.curves
