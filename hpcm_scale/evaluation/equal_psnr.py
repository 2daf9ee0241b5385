"""Bits of models relative to those of baselines at equal PSNR: image by image, and on the curves of means."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hpcm_scale.evaluation.bd_rate import METRICS, Line, rate_at
from hpcm_scale.evaluation.curves import Curve, Point, Results

MEANS = "means"
"""The row of the curves of means."""


class Row(NamedTuple):
    """A point of a model on one image, or of the means."""

    curve: Curve
    point: Point
    image: str
    """Name, or `MEANS`."""
    bpp: float
    psnr: float
    relative: dict[str, float | None]
    """By label of a baseline: bits relative to its bits at this PSNR, minus 1; None outside its curve."""


def equal_psnr(results: Results) -> Iterator[Row]:
    """Each point of each model, on each image and, last, of the means; none without baselines or PSNR.

    A baseline's bits are interpolated on its curve of the same image, or of means (`rate_at`).
    """
    anchors = [curve for curve in results.curves if curve.points[0].weights is None]
    for curve, point in results.points():
        if not anchors or point.weights is None or point.mean["psnr"] is None:
            continue
        for index, name in enumerate([*(image.name for image in point.images), MEANS]):
            bpp, psnr = _measured(point, index)
            relative = {}
            for anchor in anchors:
                line = Line(anchor.name, *zip(*(_measured(each, index) for each in anchor.points), strict=True))
                rate = rate_at(line, psnr, METRICS["psnr"])
                relative[anchor.label] = None if rate is None else bpp / rate - 1
            yield Row(curve, point, name, bpp, psnr, relative)


def _measured(point: Point, index: int) -> tuple[float, float]:
    """bpp and PSNR of an image, or of the means after the last."""
    values = vars(point.images[index]) if index < len(point.images) else point.mean
    return values["bpp"], values["psnr"]


def sentences(results: Results) -> list[str]:
    """The means in words, one sentence for each point of a model: N % fewer bits than a baseline at a PSNR."""
    return [
        f"{row.curve.label} {row.point.setting} at {row.psnr:.2f} dB: "
        + ", ".join(_in_words(label, value) for label, value in row.relative.items())
        for row in equal_psnr(results)
        if row.image == MEANS
    ]


def _in_words(label: str, value: float | None) -> str:
    if value is None:
        return f"outside the curve of {label}"
    return f"{abs(value):.1%} {'fewer' if value < 0 else 'more'} bits than {label}"
