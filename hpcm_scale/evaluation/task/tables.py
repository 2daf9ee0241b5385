"""A task evaluation as tables for people: task.md and the terminal."""

from __future__ import annotations

import math

from rich.console import Group
from rich.text import Text

from hpcm_scale.evaluation.curves import Point
from hpcm_scale.evaluation.tables import markdown_table, measured_on, narrow_table
from hpcm_scale.evaluation.task.bd_rates import HOW, TaskComparison, task_bd_rates
from hpcm_scale.evaluation.task.metrics import Metric, TaskMeasure
from hpcm_scale.evaluation.task.sections import Section, TaskResults, trained_on, trainings
from hpcm_scale.markdown import escaped

RATES = (
    "Each image was coded to the bytes of a real file, headers included, and what was measured was decoded from these "
    "bytes alone, on 8-bit pixels. bpp and PSNR are means over images. Pictures of text were coded whole, and their "
    "lines cut out afterwards."
)
COSTS = (
    "Parameters and kMAC/px (thousands of multiply-accumulates per pixel of the forward pass) are those of the codec; "
    "images and PFLOPs (1e15 floating-point operations) those of its training, the stages before it included."
)
TRAINED = "† Trained on this receiver"


def task_markdown(results: TaskResults) -> str:
    """task.md: how it was measured; per set of images and receiver a table of means, and one of BD-rates."""
    metrics = list(dict.fromkeys(metric for _, measure in results.measured for metric in measure.metrics))
    lines = ["# Task quality", RATES, HOW, "\n".join(map(_explained, metrics)), COSTS]
    for section, measure in results.measured:
        lines.append(f"## {escaped(section.results.title)}: {measure.task}, {escaped(measure.receiver)}")
        lines += map(escaped, _notes(section, measure))
        lines.append(markdown_table(task_rows(section, measure, results.parameters)))
        comparisons = list(task_bd_rates(section, measure))
        if rows := bd_rate_rows(comparisons):
            lines += ["BD-rates of our curves against the anchors in the columns:", markdown_table(rows)]
        if remarks := _remarks(comparisons):
            lines.append("\n".join(f"- {escaped(remark)}" for remark in remarks))
    codecs = {curve.label: curve.codec for section in results.sections for curve in section.results.curves}
    lines += ["## Codecs", "\n".join(f"- **{escaped(label)}**: {escaped(codec)}" for label, codec in codecs.items())]
    return "\n\n".join([*lines, measured_on(results.machine)]) + "\n"


def task_console(results: TaskResults) -> Group:
    """For a terminal of 80 columns: what a receiver makes of every codec and setting, and BD-rates."""
    shown = []
    for section, measure in results.measured:
        rows = task_rows(section, measure)
        hidden = ("PSNR (dB)", *(metric.heading for metric in measure.metrics if not metric.on_terminal))
        rows = [{key.replace(" ", "\n"): row[key] for key in row if key not in hidden} for row in rows]
        title = f"{measure.task}, {measure.receiver}: {section.results.title}"
        ends = {row["codec"]: i for i, row in enumerate(rows)}.values()
        shown.append(
            narrow_table(rows, list(rows[0]), title=title, caption="\n".join(_notes(section, measure)), ends=ends)
        )
        comparisons = list(task_bd_rates(section, measure))
        if rows := bd_rate_rows(comparisons):
            shown.append(narrow_table(rows, list(rows[0]), title=f"BD-rates by {measure.receiver}"))
        if refused := sum(each.found is None for each in comparisons):
            shown.append(
                Text(f"Pairs of curves without a BD-rate: {refused} of {len(comparisons)}; task.md says why.\n")
            )
    return Group(*shown)


def task_rows(section: Section, measure: TaskMeasure, parameters: dict[str, int] | None = None) -> list[dict[str, str]]:
    """One row per point, by headings; with what the model and its training cost if `parameters` are given."""
    rows = []
    for curve, point in section.results.points():
        label = f"{curve.label} †" if trained_on(curve, measure.receiver) else curve.label
        mean = section.mean(point, measure)
        row = {"codec": label, "setting": point.setting, "bpp": f"{point.mean['bpp']:.4f}"}
        row |= {"PSNR (dB)": "–" if point.mean["psnr"] is None else f"{point.mean['psnr']:.2f}"}
        row |= {metric.heading: f"{mean[metric.key]:.{metric.digits}f}" for metric in measure.metrics}
        rows.append(row if parameters is None else row | _costs(point, parameters))
    return rows


def bd_rate_rows(comparisons: list[TaskComparison]) -> list[dict[str, str]]:
    """One row per metric and curve, one column per anchor; "–" where there is none, no row where there are none."""
    comparisons = [each for each in comparisons if each.found]
    anchors = dict.fromkeys(each.anchor.label for each in comparisons)
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for each in comparisons:
        first = {"metric": each.metric.heading, "codec": each.curve.label}
        row = rows.setdefault(tuple(first.values()), first | dict.fromkeys(anchors, "–"))
        row[each.anchor.label] = f"{each.found.bd_rate:+.1f}%"
    return list(rows.values())


def _costs(point: Point, parameters: dict[str, int]) -> dict[str, str]:
    told = {name: [facts[name] for facts in trainings(point) if name in facts] for name in ("images", "pflops")}
    values = {
        "parameters": parameters.get(point.weights),
        "kMAC/px": point.kmac_per_pixel,
        "images": sum(told["images"]) if told["images"] else None,
        "PFLOPs": math.fsum(told["pflops"]) if told["pflops"] else None,
    }
    digits = {"kMAC/px": 1, "PFLOPs": 3}
    return {name: "–" if value is None else f"{value:,.{digits.get(name, 0)}f}" for name, value in values.items()}


def _explained(metric: Metric) -> str:
    scale = f" Scale: {metric.scale.name} ({metric.scale.unit})." if metric.scale else ""
    return f"- **{metric.heading}**: {metric.meaning}.{scale}"


def _notes(section: Section, measure: TaskMeasure) -> list[str]:
    """Whether a codec was trained on the receiver, and what it makes of uncoded pictures."""
    trained = [curve.label for curve in section.results.curves if trained_on(curve, measure.receiver)]
    notes = [f"{TRAINED}: {', '.join(trained)}." if trained else "No codec here was trained on this receiver."]
    originals = section.originals[section.measures.index(measure)]
    uncoded = [
        f"{each.heading} {originals[each.key]:.{each.digits}f}" for each in measure.metrics if each.key in originals
    ]
    return notes + ([f"Uncoded pictures: {', '.join(uncoded)}."] if uncoded else [])


def _remarks(comparisons: list[TaskComparison]) -> list[str]:
    """Why there is no BD-rate where there is none, and what was left out where there is one; each reason once."""
    reasons: dict[str, dict[str, None]] = {}
    for each in comparisons:
        if each.refused:
            reasons.setdefault(f"no BD-rate, for {each.refused}", {})[each.metric.heading] = None
        for curve, points in zip((each.curve, each.anchor), each.left_out, strict=True):
            if each.found and points:
                told = f"{points} point{'s' * (points > 1)} of {curve.label} left out: no better than a cheaper one"
                reasons.setdefault(told, {})[each.metric.heading] = None
    return [f"{', '.join(metrics)}: {reason}." for reason, metrics in reasons.items()]
