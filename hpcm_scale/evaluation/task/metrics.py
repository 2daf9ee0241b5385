"""What tasks are measured in, and the scale on which each makes a rate-quality curve."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor

from hpcm_scale.evaluation.bd_rate import Scale


class Metric(NamedTuple):
    """One number about a coded image."""

    key: str
    heading: str
    digits: int
    meaning: str
    scale: Scale | None = None
    """On which it is drawn and compared by BD-rate; None: it is in tables only."""
    quality: Callable[[float], float] | None = None
    """From the mean over images to that scale, where more is better."""
    on_terminal: bool = True
    """Whether it is shown where there is little room."""


class TaskMeasure(ABC):
    """What one receiver makes of the decoded images of one set."""

    task: ClassVar[str]
    receiver: str
    metrics: tuple[Metric, ...]

    @abstractmethod
    def score(self, index: int, original: Tensor, decoded: Tensor) -> dict[str, float]:
        """The metrics, by key, of image `index`: both uint8 (3, H, W), on the CPU."""

    def mean(self, scores: Sequence[dict[str, float]]) -> dict[str, float]:
        """The metrics, by key, of a set from those of its images: their means."""
        return {key: math.fsum(score[key] for score in scores) / len(scores) for key in scores[0]}

    def of_originals(self) -> dict[str, float]:
        """The metrics, by key, of the set before it is coded, as far as they are not what they must be."""
        return {}

    def compared(self) -> list[Metric]:
        """The metrics that have a scale."""
        return [metric for metric in self.metrics if metric.scale]


def distance_in_decibels(distance: float) -> float:
    """−10·log10 of a distance, at most 100: what is nearer is more, as in MS-SSIM in dB."""
    return -10 * math.log10(max(distance, 1e-10))
