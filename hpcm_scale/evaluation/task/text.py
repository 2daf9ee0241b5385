"""Text: whether what is written on a picture can still be read after it was coded."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.bd_rate import Scale
from hpcm_scale.evaluation.task.metrics import Metric, TaskMeasure
from hpcm_scale.evaluation.task.text_pictures import TextPictures
from hpcm_scale.machine.extractor import TokenExtractor
from hpcm_scale.tracking.progress import progress

HIGHEST = 48
"""Pixels: higher lines are made so high, for recognisers would take them for several lines."""
CER = Metric(
    "cer",
    "CER",
    4,
    "character error rate: Levenshtein distance of what is read to what is written, in all lines together, over the "
    "number of characters written; spaces do not count, width variants of a character are the same (Unicode NFKC)",
    Scale("characters read right, 100·(1 − CER)", "%"),
    lambda rate: 100 * (1 - rate),
)
ERRORS = Metric("errors", "errors", 0, "that distance, summed over the lines of a picture")
CHARACTERS = Metric("characters", "characters", 0, "characters written on a picture")


class Reading(TaskMeasure):
    """Character error rate of a recogniser on the lines of a set of pictures, cut out after decoding.

    Raises UserError where rapidfuzz is missing, or the receiver does not read.
    """

    task = "text"
    metrics = (CER, ERRORS, CHARACTERS)

    def __init__(self, recogniser: TokenExtractor, pictures: TextPictures, device: torch.device) -> None:
        if not hasattr(recogniser, "read"):
            raise UserError(f"{recogniser.name} does not read text; choose recognisers with --receivers")
        _levenshtein("", "")
        self.receiver = recogniser.name
        self._recogniser, self._pictures, self._device = recogniser.to(device), pictures, device

    def score(self, index: int, original: Tensor, decoded: Tensor) -> dict[str, float]:
        """The metrics, by key, of picture `index`, uint8 (3, H, W); the original does not matter, the truth does."""
        errors = characters = 0
        for line in self._pictures.lines(index):
            truth = normalised(line.text)
            errors += _levenshtein(normalised(self._read(line.cut(decoded))), truth)
            characters += len(truth)
        return _rate(errors, characters)

    def mean(self, scores: Sequence[dict[str, float]]) -> dict[str, float]:
        """Errors of all pictures over characters of all pictures."""
        return _rate(sum(score["errors"] for score in scores), sum(score["characters"] for score in scores))

    def of_originals(self) -> dict[str, float]:
        """The metrics, by key, of the pictures themselves: what a recogniser cannot read uncoded."""
        turns = progress(
            range(len(self._pictures)), description=f"{self.receiver} reads {self._pictures.source}", unit="picture"
        )
        originals = ((i, self._pictures.load(i)) for i in turns)
        return self.mean([self.score(i, pixels, pixels) for i, pixels in originals])

    def _read(self, pixels: Tensor) -> str:
        x = pixels[None].to(self._device).float() / 255
        height, width = x.shape[2:]
        if height > HIGHEST:
            x = F.interpolate(x, (HIGHEST, max(1, round(width * HIGHEST / height))), mode="bilinear", antialias=True)
        return self._recogniser.read(x)[0]


def normalised(text: str) -> str:
    """Without spaces, which recognisers leave out at will, and without variants of width (Unicode NFKC)."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _rate(errors: float, characters: float) -> dict[str, float]:
    return {"cer": errors / characters, "errors": errors, "characters": characters}


def _levenshtein(read: str, truth: str) -> int:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise UserError("--task text needs the package rapidfuzz; install hpcm-scale[machine]") from error
    return Levenshtein.distance(read, truth)
