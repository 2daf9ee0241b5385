"""A task evaluation as files for programs: task.json, and task.csv with a row per image."""

from __future__ import annotations

import csv
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

from hpcm_scale.evaluation.curves import Curve, Point
from hpcm_scale.evaluation.tables import COLUMNS
from hpcm_scale.evaluation.task.bd_rates import TaskComparison, task_bd_rates
from hpcm_scale.evaluation.task.metrics import TaskMeasure
from hpcm_scale.evaluation.task.sections import Section, TaskResults, trained_on
from hpcm_scale.files import write_json

FORMAT = "hpcm_scale task evaluation 1"
"""Of task.json."""


def write_task_json(results: TaskResults, path: str | Path) -> None:
    """Write task.json: everything that was measured, and the BD-rates."""
    sections = [_section(section, results) for section in results.sections if section.results.curves]
    write_json(path, {"format": FORMAT, "sections": sections, "machine": results.machine})


def task_csv(results: TaskResults) -> str:
    """task.csv: a row per image, point and receiver; metrics that a task does not have are empty."""
    metrics = {metric.key: metric.heading for _, measure in results.measured for metric in measure.metrics}
    sizes = ("width", "height", "bits", "bpp", "psnr", "ms_ssim")
    first = ["task", "receiver", "trained on it", "images", "codec", "rate", "setting", "image"]
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*first, *(COLUMNS[key] for key in sizes), *metrics.values()])
    for section, measure in results.measured:
        for curve, point in section.results.points():
            trained = trained_on(curve, measure.receiver)
            row = [measure.task, measure.receiver, trained, section.results.title]
            row += [curve.name, curve.rate, point.setting]
            for image, scores in zip(point.images, section.scores(point, measure), strict=True):
                measured = [getattr(image, key) for key in sizes]
                writer.writerow([*row, image.name, *measured, *(scores.get(key) for key in metrics)])
    return text.getvalue()


def _section(section: Section, results: TaskResults) -> dict[str, Any]:
    shown = section.results
    images = {"folder": shown.folder, "set": shown.set_name, "count": shown.count}
    return {
        "images": images | ({"digest": section.digest} if section.digest else {}),
        "measures": [
            {
                "task": measure.task,
                "receiver": measure.receiver,
                "trained_on_by": [curve.name for curve in shown.curves if trained_on(curve, measure.receiver)],
                "metrics": {metric.key: metric.meaning for metric in measure.metrics},
                "originals": originals,
                "bd_rates": [_comparison(each) for each in task_bd_rates(section, measure)],
            }
            for measure, originals in zip(section.measures, section.originals, strict=True)
        ],
        "curves": [_curve(curve, section, results) for curve in shown.curves],
    }


def _comparison(each: TaskComparison) -> dict[str, Any]:
    return {
        "metric": each.metric.key,
        "scale": each.metric.scale.name,
        "curve": each.curve.name,
        "anchor": each.anchor.name,
        **(asdict(each.found) if each.found else {"refused": each.refused}),
        "points_left_out": {"curve": each.left_out[0], "anchor": each.left_out[1]},
    }


def _curve(curve: Curve, section: Section, results: TaskResults) -> dict[str, Any]:
    return {
        "name": curve.name,
        "codec": curve.codec,
        "rate": curve.rate,
        "points": [_point(point, section, results) for point in curve.points],
    }


def _point(point: Point, section: Section, results: TaskResults) -> dict[str, Any]:
    ours = {
        "weights": point.weights,
        "facts": point.facts,
        "parameters": results.parameters.get(point.weights),
        "kmac_per_pixel": point.kmac_per_pixel,
    }
    scores = {_named(measure): section.scores(point, measure) for measure in section.measures}
    return {
        "setting": point.setting,
        **(ours if point.weights else {}),
        "mean": point.mean,
        "tasks": {_named(measure): section.mean(point, measure) for measure in section.measures},
        "images": [
            asdict(image) | {"tasks": {name: of_images[i] for name, of_images in scores.items()}}
            for i, image in enumerate(point.images)
        ],
    }


def _named(measure: TaskMeasure) -> str:
    return f"{measure.task}/{measure.receiver}"
