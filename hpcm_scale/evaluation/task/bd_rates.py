"""BD-rates over task metrics: every curve of ours against every other curve of its section."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.bd_rate import Comparison, Line, bd_rate
from hpcm_scale.evaluation.curves import Curve
from hpcm_scale.evaluation.task.metrics import Metric, TaskMeasure
from hpcm_scale.evaluation.task.sections import Section

HOW = (
    "BD-rate: percent of the anchor's bits at equal quality (negative: fewer), log rate interpolated by pchip over the "
    "quality on the metric's scale (below), averaged over what both curves reach. A scale rises with quality: "
    "−10·log10 of a distance (token distortion, KL, 1 − cosine), as for MS-SSIM, and 100·(1 − CER) for text; of the "
    "mean over images. A network's answers need not improve with every bit spent, and a curve that falls has no "
    "BD-rate, so points that are no better than a cheaper one of their own curve are left out, of curve and anchor "
    "alike: what counts is the best that a codec reaches for so many bits."
)


class TaskComparison(NamedTuple):
    """A curve and its anchor by one metric."""

    metric: Metric
    curve: Curve
    anchor: Curve
    found: Comparison | None
    refused: str | None
    """Why there is no BD-rate."""
    left_out: tuple[int, int]
    """Points of the curve and of the anchor that are no better than a cheaper one."""


def task_bd_rates(section: Section, measure: TaskMeasure) -> Iterator[TaskComparison]:
    """By every metric that has a scale; ours are the curves that come from weights."""
    curves = section.results.curves
    ours = [curve for curve in curves if any(point.weights for point in curve.points)]
    for metric in measure.compared():
        for curve in ours:
            for anchor in curves:
                if anchor is not curve:
                    yield _compared(section, measure, metric, curve, anchor)


def qualities(section: Section, measure: TaskMeasure, metric: Metric, curve: Curve) -> list[float]:
    """Of each point of a curve on the metric's scale."""
    return [metric.quality(section.mean(point, measure)[metric.key]) for point in curve.points]


def rising(line: Line) -> Line:
    """The points that are better than every cheaper one, cheapest first; of equal rates the best."""
    kept: list[tuple[float, float]] = []
    for rate, quality in sorted(zip(line.rates, line.qualities, strict=True), key=lambda point: (point[0], -point[1])):
        if not kept or quality > kept[-1][1]:
            kept.append((rate, quality))
    return Line(line.name, [rate for rate, _ in kept], [quality for _, quality in kept])


def _compared(section: Section, measure: TaskMeasure, metric: Metric, curve: Curve, anchor: Curve) -> TaskComparison:
    lines = [
        Line(each.label, [point.mean["bpp"] for point in each.points], qualities(section, measure, metric, each))
        for each in (curve, anchor)
    ]
    best = [rising(line) for line in lines]
    left_out = tuple(len(line.rates) - len(kept.rates) for line, kept in zip(lines, best, strict=True))
    found = refused = None
    try:
        found = bd_rate(*best, metric.scale)
    except UserError as error:
        refused = str(error)
    return TaskComparison(metric, curve, anchor, found, refused, left_out)
