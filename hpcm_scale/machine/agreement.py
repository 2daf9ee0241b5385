"""Agreement of a network's tokens and classes on the decoded image with those on the original."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcm_scale.evaluation.bd_rate import Scale, decibels
from hpcm_scale.machine.extractor import SMALLEST_SIDE, TokenExtractor, check_size
from hpcm_scale.machine.measures import Metric, TaskMeasure
from hpcm_scale.machine.objective import rank_difference, token_distortion

KEPT = 1 << 30
"""Bytes of the cache of originals' tokens; other originals are evaluated again for every setting."""

TOKENS = (
    Metric(
        "token_cosine",
        "token cosine",
        4,
        "cosine similarity of the two images' tokens at each position, mean over tokens, then over layers",
        Scale("token cosine, −10·log10(1 − cosine)", "dB"),
        lambda cosine: decibels(1 - cosine),
    ),
    Metric(
        "token_distortion",
        "token distortion",
        4,
        "1 − that cosine, plus the squared error of the tokens relative to the original's energy, mean over layers",
        Scale("token distortion, −10·log10", "dB"),
        decibels,
    ),
    Metric(
        "rank_difference",
        "rank difference",
        4,
        "|log effective rank of the decoded tokens − that of the original's|, mean over layers",
        on_terminal=False,
    ),
)
CLASSES = (
    Metric(
        "kl",
        "KL (nats)",
        4,
        "Kullback-Leibler divergence of the class posterior, from the original's to the decoded image's",
        Scale("class posterior, −10·log10(KL / nat)", "dB"),
        decibels,
    ),
    Metric(
        "class_cosine",
        "class cosine",
        4,
        "cosine of the two vectors of class probabilities",
        Scale("class posterior, −10·log10(1 − cosine)", "dB"),
        lambda cosine: decibels(1 - cosine),
    ),
    Metric("top1", "top-1", 3, "top-1 agreement: share of images whose most probable class stays the same"),
)
"""Metrics of receivers with classes."""


class _Output(NamedTuple):
    tokens: dict[str, Tensor]
    log_probabilities: Tensor | None


class Agreement(TaskMeasure):
    """Tokens and class posterior of a receiver; the original image is the reference. Sides from 32 pixels."""

    task = "agreement"

    def __init__(self, extractor: TokenExtractor, device: torch.device) -> None:
        super().__init__(extractor.name)
        self._extractor, self._device = extractor.to(device), device
        blank = torch.zeros(1, 3, SMALLEST_SIDE, SMALLEST_SIDE, device=device)
        classes = extractor.posterior(blank) is not None
        self.metrics = TOKENS + CLASSES if classes else TOKENS
        self._originals: dict[int, _Output] = {}
        self._free = KEPT

    @torch.no_grad()
    def score(self, index: int, original: Tensor, decoded: Tensor) -> dict[str, float]:
        """See `TaskMeasure.score`. Raises UserError for an image that is too small."""
        reference, seen = self._original(index, original), self._forward(decoded)
        pairs = [(seen.tokens[layer], tokens) for layer, tokens in reference.tokens.items()]
        cosines = [F.cosine_similarity(*pair, dim=2).mean() for pair in pairs]
        scores = {
            "token_cosine": _mean(cosines),
            "token_distortion": _mean([token_distortion(*pair) for pair in pairs]),
            "rank_difference": _mean([rank_difference(*pair) for pair in pairs]),
        }
        if reference.log_probabilities is not None and seen.log_probabilities is not None:
            scores |= class_agreement(reference.log_probabilities, seen.log_probabilities)
        return scores

    def _original(self, index: int, pixels: Tensor) -> _Output:
        if index in self._originals:
            return self._originals[index]
        seen = self._forward(pixels)
        size = sum(tokens.nbytes for tokens in seen.tokens.values())
        if size <= self._free:
            self._originals[index] = seen
            self._free -= size
        return seen

    def _forward(self, pixels: Tensor) -> _Output:
        check_size(pixels.shape[1:], "an image", "omit it")
        x = pixels[None].to(self._device).float() / 255
        log_probabilities = self._extractor.posterior(x)
        return _Output(self._extractor(x), None if log_probabilities is None else log_probabilities[0].double().cpu())


def class_agreement(reference: Tensor, seen: Tensor) -> dict[str, float]:
    """`CLASSES` by key, from the log probabilities (classes,) of the original and of the decoded image."""
    p, q = reference.exp(), seen.exp()
    return {
        "kl": max(F.kl_div(seen, reference, reduction="sum", log_target=True).item(), 0.0),  # rounding
        "class_cosine": F.cosine_similarity(p, q, dim=0).item(),
        "top1": float(p.argmax() == q.argmax()),
    }


def _mean(values: list[Tensor]) -> float:
    return math.fsum(value.item() for value in values) / len(values)
