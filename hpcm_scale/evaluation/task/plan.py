"""Which images and which receivers a task evaluation takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hpcm_scale.data.image_set import ImageSet
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.results import Results
from hpcm_scale.evaluation.task.agreement import Agreement
from hpcm_scale.evaluation.task.rendered_text import RenderedText
from hpcm_scale.evaluation.task.sections import Section
from hpcm_scale.evaluation.task.text import Reading
from hpcm_scale.evaluation.task.text_pictures import LABELS, LabelledPictures, TextPictures, digest, scanned_page
from hpcm_scale.machine.extractor import TokenExtractor
from hpcm_scale.machine.receivers import receiver

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
