"""Task metrics, and the results of an image set with its task metrics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from hpcm_scale.evaluation.bd_rate import Scale
from hpcm_scale.evaluation.curves import Curve, Point, Section
from hpcm_scale.evaluation.measures import Measured


class Metric(NamedTuple):
    """One number about a decoded image."""

    key: str
    heading: str
    digits: int
    meaning: str
    scale: Scale | None = None
    """Scale of its plot and its BD-rate; None: in tables only."""
    quality: Callable[[float], float] = float
    """Maps the mean over images to that scale, on which more is better; the identity by default."""
    on_terminal: bool = True
    """Whether the terminal's narrow table shows it."""


class TaskMeasure(ABC):
    """The metrics of one receiver on the decoded images of one set."""

    task: ClassVar[str]
    receiver: str
    metrics: tuple[Metric, ...]
    originals: dict[str, float]
    """Metrics of the uncoded images (`of_originals`), after `TaskSection.prepare`."""
    scores: dict[Measured, dict[str, float]]
    """Metrics by key of each decoded image."""

    def __init__(self, receiver: str) -> None:
        self.receiver, self.originals, self.scores = receiver, {}, {}

    @abstractmethod
    def score(self, index: int, original: Tensor, decoded: Tensor) -> dict[str, float]:
        """Metrics by key of image `index`; both uint8 (3, H, W), on the CPU."""

    def mean(self, scores: Sequence[dict[str, float]]) -> dict[str, float]:
        """Metrics by key of the set, from those of its images: their means."""
        return {key: math.fsum(score[key] for score in scores) / len(scores) for key in scores[0]}

    def of_originals(self) -> dict[str, float]:
        """Metrics by key of the uncoded images, where these are not perfect by definition."""
        return {}

    def compared(self) -> list[Metric]:
        """The metrics that have a scale."""
        return [metric for metric in self.metrics if metric.scale]

    def scores_of(self, point: Point) -> list[dict[str, float]]:
        """Metrics by key of each image of a point."""
        return [self.scores[image] for image in point.images]

    def mean_of(self, point: Point) -> dict[str, float]:
        """Metrics by key of a point."""
        return self.mean(self.scores_of(point))


@dataclass
class TaskSection(Section):
    """One set of images, its results and its measures."""

    measures: Sequence[TaskMeasure] = ()
    digest: str | None = None
    """Of images of text (`text.digest`)."""

    def prepare(self) -> None:
        """Measure the uncoded images."""
        for measure in self.measures:
            measure.originals = measure.of_originals()

    def observe(self, name: str, index: int, original: Tensor, decoded: Tensor, measured: Measured) -> None:
        """Score a decoded image by every measure."""
        for measure in self.measures:
            measure.scores[measured] = measure.score(index, original, decoded)


def trainings(point: Point) -> list[dict[str, Any]]:
    """Facts of the training of a point's weights, of the training before it, and so on."""
    facts, found = point.facts, []
    while facts:
        found.append(facts)
        facts = facts.get("origin", {}).get("facts")
    return found


def trained_on(curve: Curve, receiver: str) -> bool:
    """Whether any training of any of the curve's weights used this receiver."""
    return any(receiver in facts.get("receivers", ()) for point in curve.points for facts in trainings(point))
