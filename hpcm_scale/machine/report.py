"""Reports of a task evaluation: BD-rates over task metrics, task.json, task.csv, task.md, task.png and the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullLocator
from rich.console import Group
from rich.text import Text

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.bd_rate import Comparison, Line, bd_rate
from hpcm_scale.evaluation.curves import Curve, Point, Results
from hpcm_scale.evaluation.rate_distortion_plot import draw_curve, dress, legend, styles
from hpcm_scale.evaluation.tables import (
    COLUMNS,
    csv_text,
    curve_to_dict,
    described,
    images_to_dict,
    markdown_table,
    measured_on,
    narrow_table,
    point_to_dict,
)
from hpcm_scale.files import write_json, write_text
from hpcm_scale.formatting import decimal, escaped, label, new_figure, save
from hpcm_scale.machine.measures import Metric, TaskMeasure, TaskSection, trained_on, trainings


def _measured(sections: Sequence[TaskSection]) -> list[tuple[TaskSection, TaskMeasure]]:
    return [(section, measure) for section in sections for measure in section.measures]


# BD-rates over task metrics.


HOW = (
    "BD-rate: percent of the anchor's bits at equal quality (negative: fewer); the log rate is interpolated by pchip "
    "over the metric's scale (below) and averaged over the range that both curves share. More is better on every "
    "scale: −10·log10 of a distance (token distortion, KL, 1 − cosine), as for MS-SSIM, and 100·(1 − CER) for text, of "
    "the mean over images. Task metrics need not improve with the rate, and pchip needs rising curves: points that are "
    "no better than a cheaper point of their own curve are left out, of curve and anchor alike."
)


class TaskComparison(NamedTuple):
    """A curve and its anchor by one metric."""

    metric: Metric
    curve: Curve
    anchor: Curve
    found: Comparison | None
    refused: str | None
    """Reason why there is no BD-rate."""
    left_out: tuple[int, int]
    """Numbers of points of the curve and of the anchor that are no better than a cheaper one."""


def task_bd_rates(curves: Sequence[Curve], measure: TaskMeasure) -> Iterator[TaskComparison]:
    """BD-rates of every model's curve against every other curve, by every metric that has a scale."""
    models = [curve for curve in curves if any(point.weights for point in curve.points)]
    for metric in measure.compared():
        for curve in models:
            for anchor in curves:
                if anchor is not curve:
                    yield _compared(measure, metric, curve, anchor)


def qualities(measure: TaskMeasure, metric: Metric, curve: Curve) -> list[float]:
    """Quality of each point of a curve on the metric's scale."""
    return [metric.quality(measure.mean_of(point)[metric.key]) for point in curve.points]


def rising(line: Line) -> Line:
    """The points that are better than every cheaper one, cheapest first; of equal rates the best."""
    kept: list[tuple[float, float]] = []
    for rate, quality in sorted(zip(line.rates, line.qualities, strict=True), key=lambda point: (point[0], -point[1])):
        if not kept or quality > kept[-1][1]:
            kept.append((rate, quality))
    return Line(line.name, [rate for rate, _ in kept], [quality for _, quality in kept])


def _compared(measure: TaskMeasure, metric: Metric, curve: Curve, anchor: Curve) -> TaskComparison:
    lines = [
        Line(each.label, [point.mean["bpp"] for point in each.points], qualities(measure, metric, each))
        for each in (curve, anchor)
    ]
    best = [rising(line) for line in lines]
    left_out = (len(lines[0].rates) - len(best[0].rates), len(lines[1].rates) - len(best[1].rates))
    found = refused = None
    assert metric.scale is not None
    try:
        found = bd_rate(best[0], best[1], metric.scale)
    except UserError as error:
        refused = str(error)
    return TaskComparison(metric, curve, anchor, found, refused, left_out)


# Figure: a panel per set of images, receiver and metric.


PANELS_IN_A_ROW = 4
"""At most; the number of metrics of a receiver with classes."""
TICKS = (1, 1.5, 2, 3, 4, 5, 7)
"""Tick marks per decade of the rate."""
WIDTH = 50
"""Characters per line of a panel's title."""


def draw_tasks(sections: Sequence[TaskSection], path: str | Path) -> None:
    """Draw every metric that has a scale against the mean bpp, which is logarithmic; more is better.

    Hollow markers: trained on the receiver of the panel. Dashed line: the score of uncoded images. The suffix of `path`
    sets the format.
    """
    panels = [(section, each, metric) for section, each in _measured(sections) for metric in each.compared()]
    columns = min(PANELS_IN_A_ROW, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (1 + 4.6 * columns, 1.2 + 4.3 * rows)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    with new_figure(figsize=size, dpi=120, layout=layout) as figure:
        places = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (section, measure, metric) in zip(places, panels, strict=False):
            _draw_panel(axes, section.results, measure, metric)
        for axes in places[len(panels) :]:
            axes.set_visible(False)
        hollow = any(
            trained_on(curve, each.receiver) for section, each, _ in panels for curve in section.results.curves
        )
        note = "; hollow markers: trained on the receiver of the panel" if hollow else ""
        figure.suptitle(f"Rate and task quality: more is better{note}", fontweight="bold")
        legend(figure)
        save(figure, path)


def _draw_panel(axes: Axes, results: Results, measure: TaskMeasure, metric: Metric) -> None:
    curves = results.curves
    for curve, style in zip(curves, styles(curves), strict=True):
        filled = not trained_on(curve, measure.receiver)
        draw_curve(axes, curve, qualities(measure, metric, curve), *style, filled=filled)
    if metric.key in measure.originals:
        uncoded = metric.quality(measure.originals[metric.key])
        axes.axhline(uncoded, color="0.4", linestyle="--", linewidth=1.2, label="uncoded images")
    assert metric.scale is not None
    dress(axes, f"{metric.scale.name} ({metric.scale.unit})")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    seen = [curve.label for curve in curves if trained_on(curve, measure.receiver)]
    known = f"used in training by {', '.join(map(label, seen))}" if seen else "not used in training"
    lines = (f"{label(measure.receiver)}: {known}", label(results.title))
    axes.set_title("\n".join(fill(line, WIDTH) for line in lines), fontsize=10)


# Tables: task.md and the terminal.


RATES = (
    "Rates are those of real files, headers included; every measured image, 8 bits per channel, was decoded from its "
    "file. bpp and PSNR are means over images. Images of text are coded whole; their lines are cropped after decoding."
)
COSTS = (
    "Parameters and kMAC/px (thousands of multiply-accumulates per pixel, forward pass) are of the codec; images and "
    "PFLOPs (1e15 floating-point operations) are of its training, earlier stages included."
)
TRAINED = "† Trained on this receiver"


def task_markdown(sections: Sequence[TaskSection]) -> str:
    """task.md: methods, then a table of means and one of BD-rates per set of images and receiver."""
    metrics = list(dict.fromkeys(metric for _, measure in _measured(sections) for metric in measure.metrics))
    lines = ["# Task quality", RATES, HOW, "\n".join(map(_explained, metrics)), COSTS]
    for section, measure in _measured(sections):
        results = section.results
        lines.append(f"## {escaped(results.title)}: {measure.task}, {escaped(measure.receiver)}")
        lines += map(escaped, _notes(results.curves, measure))
        lines.append(markdown_table(task_rows(results, measure, costs=True)))
        comparisons = list(task_bd_rates(results.curves, measure))
        if rows := bd_rate_rows(comparisons):
            lines += ["BD-rates of the models against the anchors in the columns:", markdown_table(rows)]
        if remarks := _remarks(comparisons):
            lines.append("\n".join(f"- {escaped(remark)}" for remark in remarks))
    codecs = {curve.label: curve.codec for section in sections for curve in section.results.curves}
    lines += ["## Codecs", "\n".join(described(label, codec) for label, codec in codecs.items())]
    return "\n\n".join([*lines, measured_on(sections[0].results.system)]) + "\n"


def task_console(sections: Sequence[TaskSection]) -> Group:
    """Tables of means and BD-rates for a terminal of 80 columns."""
    shown = []
    for section, measure in _measured(sections):
        results = section.results
        rows = task_rows(results, measure)
        hidden = ("PSNR (dB)", *(metric.heading for metric in measure.metrics if not metric.on_terminal))
        rows = [{key.replace(" ", "\n"): row[key] for key in row if key not in hidden} for row in rows]
        title = f"{measure.task}, {measure.receiver}: {results.title}"
        ends = {row["codec"]: i for i, row in enumerate(rows)}.values()
        notes = "\n".join(_notes(results.curves, measure))
        shown.append(narrow_table(rows, list(rows[0]), title=title, caption=notes, ends=ends))
        comparisons = list(task_bd_rates(results.curves, measure))
        if rows := bd_rate_rows(comparisons):
            shown.append(narrow_table(rows, list(rows[0]), title=f"BD-rates by {measure.receiver}"))
        if refused := sum(each.found is None for each in comparisons):
            shown.append(
                Text(f"Pairs of curves without a BD-rate: {refused} of {len(comparisons)}; task.md has the reasons.\n")
            )
    return Group(*shown)


def task_rows(results: Results, measure: TaskMeasure, *, costs: bool = False) -> list[dict[str, str]]:
    """One row per point, by headings; with the costs of model and training if `costs`."""
    rows = []
    for curve, point in results.points():
        label = f"{curve.label} †" if trained_on(curve, measure.receiver) else curve.label
        mean = measure.mean_of(point)
        row = {"codec": label, "setting": point.setting, "bpp": f"{point.mean['bpp']:.4f}"}
        row["PSNR (dB)"] = decimal(point.mean["psnr"], 2)
        row |= {metric.heading: f"{mean[metric.key]:.{metric.digits}f}" for metric in measure.metrics}
        rows.append(row | _costs(point) if costs else row)
    return rows


def bd_rate_rows(comparisons: list[TaskComparison]) -> list[dict[str, str]]:
    """One row per metric and curve, one column per anchor; "–" without a BD-rate."""
    found = [(each, each.found.bd_rate) for each in comparisons if each.found]
    anchors = dict.fromkeys(each.anchor.label for each, _ in found)
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for each, percent in found:
        first = {"metric": each.metric.heading, "codec": each.curve.label}
        row = rows.setdefault(tuple(first.values()), first | dict.fromkeys(anchors, "–"))
        row[each.anchor.label] = f"{percent:+.1f}%"
    return list(rows.values())


def _costs(point: Point) -> dict[str, str]:
    known = {name: [facts[name] for facts in trainings(point) if name in facts] for name in ("images", "pflops")}
    values = {
        "parameters": point.parameters,
        "kMAC/px": point.kmac_per_pixel,
        "images": sum(known["images"]) if known["images"] else None,
        "PFLOPs": math.fsum(known["pflops"]) if known["pflops"] else None,
    }
    digits = {"kMAC/px": 1, "PFLOPs": 3}
    return {name: "–" if value is None else f"{value:,.{digits.get(name, 0)}f}" for name, value in values.items()}


def _explained(metric: Metric) -> str:
    scale = f" Scale: {metric.scale.name} ({metric.scale.unit})." if metric.scale else ""
    return f"- **{metric.heading}**: {metric.meaning}.{scale}"


def _notes(curves: Sequence[Curve], measure: TaskMeasure) -> list[str]:
    """The codecs trained on the receiver, and its scores on uncoded images."""
    trained = [curve.label for curve in curves if trained_on(curve, measure.receiver)]
    notes = [f"{TRAINED}: {', '.join(trained)}." if trained else "No codec in this table was trained on this receiver."]
    originals = [(each, measure.originals[each.key]) for each in measure.metrics if each.key in measure.originals]
    uncoded = [f"{metric.heading} {score:.{metric.digits}f}" for metric, score in originals]
    return notes + ([f"Uncoded images: {', '.join(uncoded)}."] if uncoded else [])


def _remarks(comparisons: list[TaskComparison]) -> list[str]:
    """Reasons for missing BD-rates, and points left out of the others; each reason once."""
    reasons: dict[str, dict[str, None]] = {}
    for each in comparisons:
        if each.refused:
            reasons.setdefault(f"no BD-rate: {each.refused}", {})[each.metric.heading] = None
        for curve, points in zip((each.curve, each.anchor), each.left_out, strict=True):
            if each.found and points:
                reason = f"{points} point{'s' * (points > 1)} of {curve.label} left out: no better than a cheaper one"
                reasons.setdefault(reason, {})[each.metric.heading] = None
    return [f"{', '.join(metrics)}: {reason}." for reason, metrics in reasons.items()]


# Files for programs: task.json and task.csv.


FORMAT = "hpcm_scale task evaluation 1"
"""Format of task.json."""


def write_task_files(sections: Sequence[TaskSection], out: Path) -> None:
    """Write task.json, task.csv, task.md and task.png to a folder, for sections that have a curve."""
    write_task_json(sections, out / "task.json")
    write_text(out / "task.csv", task_csv(sections))
    write_text(out / "task.md", task_markdown(sections))
    draw_tasks(sections, out / "task.png")


def write_task_json(sections: Sequence[TaskSection], path: str | Path) -> None:
    """Write task.json: all measurements and BD-rates."""
    system = sections[0].results.system
    write_json(path, {"format": FORMAT, "sections": [*map(_section, sections)], "machine": system})


def task_csv(sections: Sequence[TaskSection]) -> str:
    """task.csv: a row per image, point and receiver; metrics of other tasks are empty."""
    metrics = {metric.key: metric.heading for _, measure in _measured(sections) for metric in measure.metrics}
    sizes = ("width", "height", "bits", "bpp", "psnr", "ms_ssim")
    first = ["task", "receiver", "trained on it", "images", "codec", "rate", "setting", "image"]
    rows: list[list[Any]] = [[*first, *(COLUMNS[key] for key in sizes), *metrics.values()]]
    for section, measure in _measured(sections):
        for curve, point in section.results.points():
            trained = trained_on(curve, measure.receiver)
            row = [measure.task, measure.receiver, trained, section.results.title]
            row += [curve.name, curve.rate, point.setting]
            for image, scores in zip(point.images, measure.scores_of(point), strict=True):
                measured = [getattr(image, key) for key in sizes]
                rows.append([*row, image.name, *measured, *(scores.get(key) for key in metrics)])
    return csv_text(rows)


def _section(section: TaskSection) -> dict[str, Any]:
    curves = section.results.curves
    measures = [
        {
            "task": measure.task,
            "receiver": measure.receiver,
            "trained_on_by": [curve.name for curve in curves if trained_on(curve, measure.receiver)],
            "metrics": {metric.key: metric.meaning for metric in measure.metrics},
            "originals": measure.originals,
            "bd_rates": [_comparison(each) for each in task_bd_rates(curves, measure)],
        }
        for measure in section.measures
    ]
    return {
        "images": images_to_dict(section.results) | ({"digest": section.digest} if section.digest else {}),
        "measures": measures,
        "curves": [
            curve_to_dict(curve) | {"points": [_point(point, section.measures) for point in curve.points]}
            for curve in curves
        ],
    }


def _comparison(each: TaskComparison) -> dict[str, Any]:
    return {
        "metric": each.metric.key,
        "scale": each.metric.scale and each.metric.scale.name,
        "curve": each.curve.name,
        "anchor": each.anchor.name,
        **(asdict(each.found) if each.found else {"refused": each.refused}),
        "points_left_out": {"curve": each.left_out[0], "anchor": each.left_out[1]},
    }


def _point(point: Point, measures: Sequence[TaskMeasure]) -> dict[str, Any]:
    """`point_to_dict`, with the scores of the point and of its images."""
    named = {f"{measure.task}/{measure.receiver}": measure for measure in measures}
    values = point_to_dict(point)
    for image, measured in zip(values["images"], point.images, strict=True):
        image["tasks"] = {name: measure.scores[measured] for name, measure in named.items()}
    parameters = {"parameters": point.parameters} if point.weights else {}
    return values | parameters | {"tasks": {name: measure.mean_of(point) for name, measure in named.items()}}
