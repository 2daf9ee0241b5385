"""Task evaluation: the receivers and the image sets of `hpcm evaluate --task`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import RenderableType
from torch import Size

from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.curves import Results, system_info
from hpcm_scale.machine.agreement import Agreement
from hpcm_scale.machine.extractor import TokenExtractor, check_size
from hpcm_scale.machine.measures import TaskSection
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.machine.recogniser import TextRecogniser
from hpcm_scale.machine.report import task_console, write_task_files
from hpcm_scale.machine.text import LABELS, LabelledImages, Reading, RenderedText, TextImages, digest, scanned_page

AGREEMENT, TEXT = "agreement", "text"
RECEIVERS = {AGREEMENT: ("efficientnet-lite0", "efficientnet-lite2"), TEXT: ("pp-ocrv4", "pp-ocrv6")}
"""Default receivers of each task: the first to train on, the second to judge with."""


class TaskEvaluation:
    """The tasks of one evaluation, their receivers and their results."""

    def __init__(self, tasks: Sequence[str], receivers: Sequence[str], device: torch.device) -> None:
        """`receivers`: see `task_receivers`."""
        self.receivers, self.device = task_receivers(tasks, receivers), device
        self.sections: list[TaskSection] = []

    def check(self, size: Size, name: str) -> None:
        """Raises UserError if an image of (height, width) is too small for a task."""
        if AGREEMENT in self.receivers:
            check_size(size, name, "omit it from --images, or omit --task agreement")

    def image_section(self, results: Results, images: ImageSet) -> TaskSection:
        """The folder of images: agreement with each receiver, if that is a task."""
        measures = [Agreement(each, self.device) for each in self.receivers.get(AGREEMENT, ())]
        section = TaskSection(results, images, measures)
        self.sections += [section] if measures else []
        return section

    def text_sections(self, folder: str | None, rendered: int, limit: int | None = None) -> list[TaskSection]:
        """Images of text, if that is a task: `rendered` ones, the scanned page, and those of a folder with labels.

        The folder must have labels if text is the only task. Raises UserError for wrong or missing labels, and if no
        image is left.
        """
        if TEXT not in self.receivers:
            return []
        sets: list[TextImages | None] = [RenderedText(rendered) if rendered else None, scanned_page()]
        if folder and (AGREEMENT not in self.receivers or Path(folder, LABELS).is_file()):
            sets.append(LabelledImages(folder, limit=limit))
        if not any(sets):
            raise UserError(
                "no-text-images",
                "--text-images",
                f"--text-images 0 leaves no images of text; use 1 or more, give --images a folder with {LABELS}, or "
                "install hpcm-scale[machine]",
            )
        system = system_info()
        sections = [
            TaskSection(
                Results(images.source, None, len(images), [], system),
                images,
                [Reading(each, images, self.device) for each in self.receivers[TEXT]],
                digest(images),
            )
            for images in sets
            if images
        ]
        self.sections += sections
        return sections

    def console(self) -> RenderableType:
        """The tables for the terminal."""
        return task_console(self.sections)

    def write(self, out: Path) -> None:
        """Write all results so far to the folder `out`; nothing before the first curve."""
        coded = [section for section in self.sections if section.results.curves]
        if coded:
            write_task_files(coded, out)


task_evaluation = TaskEvaluation
"""See `hpcm_scale.tasks.TaskPlugin`."""


def task_receivers(tasks: Sequence[str], names: Sequence[str]) -> dict[str, list[TokenExtractor]]:
    """The receivers of each task.

    With both tasks, receivers that read text are for text and the others for agreement. A task without a receiver among
    `names` has its default ones. Raises UserError for a receiver that cannot be loaded.
    """
    named = [receiver(name) for name in names]
    chosen = {}
    for task in tasks:
        fit = [each for each in named if len(tasks) == 1 or isinstance(each, TextRecogniser) == (task == TEXT)]
        chosen[task] = fit or [receiver(name) for name in RECEIVERS[task]]
    return chosen
