"""Agreement of a network's tokens and classes, in numbers worked out another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.bd_rate import decibels
from hpcm_scale.machine import agreement
from hpcm_scale.machine.agreement import Agreement, class_agreement
from hpcm_scale.machine.receivers import receiver

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def original() -> torch.Tensor:
    return torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def worse(original) -> list[torch.Tensor]:
    """The original with more and more noise."""
    noise = torch.randint(-60, 61, original.shape, generator=torch.Generator().manual_seed(1))
    return [(original + noise * part // 4).clamp(0, 255).to(torch.uint8) for part in (1, 2, 4)]


def test_the_original_agrees_with_itself(original):
    for name, classes in (("random-vit", False), ("efficientnet-lite0", True)):
        measure = Agreement(receiver(name), CPU)
        scores = measure.score(0, original, original)
        assert list(scores) == [metric.key for metric in measure.metrics] and ("kl" in scores) == classes
        same = {"token_cosine": 1, "token_distortion": 0, "rank_difference": 0, "kl": 0, "class_cosine": 1, "top1": 1}
        assert scores == pytest.approx({key: same[key] for key in scores}, abs=1e-6)


def test_tokens_are_compared_place_by_place_and_layer_by_layer(original, worse):
    extractor = receiver("random-vit:3")
    measure = Agreement(extractor, CPU)
    layers = [[t[0].double().numpy() for t in extractor(x[None] / 255).values()] for x in (original, worse[2])]
    cosines, distortions = [], []
    for a, b in zip(*layers, strict=True):
        cosine = ((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))).mean()
        cosines.append(cosine)
        distortions.append(1 - cosine + ((a - b) ** 2).sum() / (a**2).sum())
    scores = measure.score(0, original, worse[2])
    assert scores["token_cosine"] == pytest.approx(np.mean(cosines), rel=1e-5)
    assert scores["token_distortion"] == pytest.approx(np.mean(distortions), rel=1e-4)


def test_more_noise_agrees_less(original, worse):
    measure = Agreement(receiver("random-vit"), CPU)
    scores = [measure.score(0, original, x) for x in worse]
    for metric in measure.compared():
        qualities = [metric.quality(score[metric.key]) for score in scores]
        assert qualities == sorted(qualities, reverse=True) and len(set(qualities)) == 3


def test_classes_are_compared_as_distributions():
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    found = class_agreement(p.log(), q.log())
    assert found["kl"] == pytest.approx((p * (p / q).log()).sum().item())  # the original's to the decoded's
    assert found["kl"] != pytest.approx((q * (q / p).log()).sum().item())
    assert found["class_cosine"] == pytest.approx((p @ q / (p.norm() * q.norm())).item())
    assert found["top1"] == 0 and class_agreement(p.log(), p.log())["top1"] == 1


def test_originals_are_looked_at_once_where_there_is_room(original, worse, monkeypatch):
    looked = []
    forward = Agreement._forward
    monkeypatch.setattr(Agreement, "_forward", lambda self, pixels: looked.append(pixels) or forward(self, pixels))
    measure = Agreement(receiver("random-vit"), CPU)
    kept = [measure.score(0, original, x) for x in worse]
    assert len(looked) == 4
    monkeypatch.setattr(agreement, "KEPT", 0)
    measure = Agreement(receiver("random-vit"), CPU)
    assert [measure.score(0, original, x) for x in worse] == kept and len(looked) == 10


def test_small_images_are_refused():
    small = torch.zeros(3, 31, 64, dtype=torch.uint8)
    with pytest.raises(UserError, match="64×31 pixels, but receivers need images with sides of at least 32"):
        Agreement(receiver("random-vit"), CPU).score(0, small, small)


def test_distances_are_reported_in_decibels():
    assert [decibels(x) for x in (1, 0.1, 0, 10)] == pytest.approx([0, 10, 100, -10])
