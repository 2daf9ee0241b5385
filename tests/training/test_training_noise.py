"""The noise of the likelihoods belongs to the image."""

from __future__ import annotations

import pytest
import torch

from hpcm_scale.config.compose import compose_model
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.training.task import image_noise


@pytest.fixture(scope="module")
def nano() -> HPCM:
    torch.manual_seed(0)
    return HPCM(compose_model("nano"))


def noise_of(model: HPCM, indices: list[int], seed: int = 0):
    return image_noise(model, torch.zeros(len(indices), 3, 256, 256), torch.tensor(indices), seed)


def test_noise_belongs_to_the_image_not_to_the_batch(nano):
    together = noise_of(nano, [3, 4, 5, 6])
    apart = [noise_of(nano, indices) for indices in ([3], [6, 5], [4])]
    for kind in ("y", "z"):
        first, second, third = (getattr(noise, kind) for noise in apart)
        assert torch.equal(getattr(together, kind), torch.cat([first, third, second.flip(0)]))


def test_noise_is_uniform_independent_and_seeded(nano):
    noise = noise_of(nano, [0, 1, 2**40])
    assert noise.y.shape == (3, 16, 16, 16) and noise.z.shape == (3, 16, 4, 4)
    assert noise.y.dtype == noise.z.dtype == torch.float32
    assert noise.y.min() >= -0.5 and noise.y.max() < 0.5
    assert abs(noise.y.mean()) < 0.01 and noise.y.var() == pytest.approx(1 / 12, rel=0.03)
    other_seed = noise_of(nano, [0, 1, 2**40], seed=1)
    samples = torch.cat([noise.y.flatten(1), other_seed.y.flatten(1)])
    assert (torch.corrcoef(samples) - torch.eye(6)).abs().max() < 0.08
    assert torch.equal(noise_of(nano, [1]).y[0], noise.y[1])
