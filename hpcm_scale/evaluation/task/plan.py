"""Which images and which receivers a task evaluation takes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.baselines import OtherCodec
from hpcm_scale.evaluation.bd_rate import METRICS
from hpcm_scale.evaluation.coders import Watcher
from hpcm_scale.evaluation.curves import Curve, Point, Watch, Weights, model_curve, other_curve
from hpcm_scale.evaluation.measures import Measured
from hpcm_scale.evaluation.pictures import Crops
from hpcm_scale.evaluation.tables import Results
from hpcm_scale.evaluation.task.agreement import Agreement, TaskMeasure
from hpcm_scale.evaluation.task.text import (
    LABELS,
    LabelledPictures,
    Reading,
    RenderedText,
    TextPictures,
    digest,
    scanned_page,
)
from hpcm_scale.machine.extractor import TokenExtractor
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.model.parameters import on_meta, parameter_count

# One set of images through all codecs, and what receivers make of every decoded image.


@dataclass
class Section:
    """Curves over one set of images, with the scores of its measures.

    Each image is coded once by every codec at every setting, whatever is measured.
    """

    results: Results
    images: ImageSet | TextPictures
    measures: list[TaskMeasure]
    digest: str | None = None
    """Of pictures of text (`text_pictures.digest`)."""
    originals: list[dict[str, float]] = field(default_factory=list)
    """Of each measure, what is known of the originals (`TaskMeasure.of_originals`)."""
    _scores: dict[Measured, list[dict[str, float]]] = field(default_factory=dict)
    """Of each coded image, those of each measure."""

    def look_at_originals(self) -> None:
        """Have the measures look at the images before they are coded."""
        self.originals = [measure.of_originals() for measure in self.measures]

    def code(
        self,
        models: Sequence[Sequence[Weights]],
        others: Sequence[OtherCodec],
        *,
        device: torch.device,
        estimate: bool = False,
        crops: Crops | None = None,
        metrics: Collection[str] = tuple(METRICS),
    ) -> Iterator[Curve]:
        """Code the images with every model (`read_weights`) and other codec; a curve that is yielded is kept.

        `crops` are chosen of the first model's; `metrics` are measured of every decoded image.
        """
        options = {"device": device, "estimate": estimate, "metrics": metrics}
        for group in models:
            watch = _together(self._watch, crops.ours) if crops and group is models[0] else self._watch
            self.results.curves.append(model_curve(group, self.images, watch=watch, **options))
            yield self.results.curves[-1]
        for codec in others:
            watch = _together(self._watch, crops.other) if crops else self._watch
            self.results.curves.append(other_curve(codec, self.images, watch=watch, metrics=metrics))
            yield self.results.curves[-1]

    def _watch(self, codec: str) -> Watcher:
        return self._look

    def _look(self, index: int, original: Tensor, decoded: Tensor, measured: Measured) -> None:
        self._scores[measured] = [measure.score(index, original, decoded) for measure in self.measures]

    def scores(self, point: Point, measure: TaskMeasure) -> list[dict[str, float]]:
        """The metrics, by key, of each image of a point."""
        which = self.measures.index(measure)
        return [self._scores[image][which] for image in point.images]

    def mean(self, point: Point, measure: TaskMeasure) -> dict[str, float]:
        """The metrics, by key, of a point."""
        return measure.mean(self.scores(point, measure))


@dataclass(frozen=True)
class TaskResults:
    """All sections of an evaluation."""

    sections: list[Section]
    parameters: dict[str, int]
    """Of the models, by path of their weights."""
    machine: dict[str, Any]
    """Versions and hardware (`results.machine`)."""

    @property
    def measured(self) -> list[tuple[Section, TaskMeasure]]:
        """Every measure of every section that has a curve."""
        return [(section, each) for section in self.sections if section.results.curves for each in section.measures]


def parameters_of(models: Sequence[Sequence[Weights]]) -> dict[str, int]:
    """How many parameters the codecs of weights have, by path."""
    counts = [parameter_count(on_meta(group[0].config)) for group in models]  # those of a curve are built alike
    return {weights.path: count for group, count in zip(models, counts, strict=True) for weights in group}


def trainings(point: Point) -> list[dict[str, Any]]:
    """The facts of the training that a model's weights come from, of the one that this started from, and so on."""
    facts, found = point.facts, []
    while facts:
        found.append(facts)
        facts = facts.get("origin", {}).get("facts")
    return found


def trained_on(curve: Curve, receiver: str) -> bool:
    """Whether any of a curve's weights saw this receiver in any of their trainings."""
    return any(receiver in facts.get("receivers", ()) for point in curve.points for facts in trainings(point))


def _together(*watches: Watch) -> Watch:
    def watch(codec: str) -> Watcher:
        watchers = [each(codec) for each in watches]

        def look(index: int, original: Tensor, decoded: Tensor, measured: Measured) -> None:
            for each in watchers:
                each(index, original, decoded, measured)

        return look

    return watch


AGREEMENT, TEXT = "agreement", "text"
RECEIVERS = {AGREEMENT: ("efficientnet-lite0", "efficientnet-lite2"), TEXT: ("pp-ocrv4", "pp-ocrv6")}
"""The usual receivers of each task: the first to train on, the second to judge with."""


def task_receivers(tasks: Sequence[str], names: Sequence[str]) -> dict[str, list[TokenExtractor]]:
    """The receivers of each task.

    Of those named, where there are two tasks, the ones that read text are for text and the others for agreement; a task
    that is left without takes its usual ones. Raises UserError for a receiver that cannot be had.
    """
    named = {name: receiver(name) for name in names}
    chosen = {}
    for task in tasks:
        fit = [each for each in named.values() if len(tasks) == 1 or hasattr(each, "read") == (task == TEXT)]
        chosen[task] = fit or [receiver(name) for name in RECEIVERS[task]]
    return chosen


def photo_section(
    images: ImageSet, results: Results, receivers: Sequence[TokenExtractor], device: torch.device
) -> Section:
    """The folder of images: agreement with each of the receivers, if there are any."""
    return Section(results, images, [Agreement(each, device) for each in receivers])


def text_sections(
    folder: str | None,
    required: bool,
    rendered: int,
    limit: int | None,
    receivers: Sequence[TokenExtractor],
    device: torch.device,
    machine: dict[str, Any],
) -> list[Section]:
    """Pictures of text: `rendered` ones made here, the scanned page if it is there, those that `folder` has labels of.

    Raises UserError if there is none of all, if the labels are wrong, and if they are missing where `required`.
    """
    sets: list[TextPictures | None] = [RenderedText(rendered) if rendered else None, scanned_page()]
    if folder and (required or Path(folder, LABELS).is_file()):
        sets.append(LabelledPictures(folder, limit=limit))
    if not any(sets):
        raise UserError("there is no picture of text; leave out --text-pictures 0, or install hpcm-scale[machine]")
    return [
        Section(
            Results(pictures.source, None, len(pictures), [], machine),
            pictures,
            [Reading(each, pictures, device) for each in receivers],
            digest(pictures),
        )
        for pictures in sets
        if pictures
    ]
