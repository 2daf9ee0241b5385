from __future__ import annotations

import numpy as np
import pytest

from hpcm_scale.scaling.filters import smooth, smoothed

STEPS = np.arange(2000)
PART = STEPS / STEPS.size
SCHEDULES = {
    "steps": np.select([PART < 0.8, PART < 0.9, PART < 0.95], [1e-3, 3e-4, 1e-4], 1e-5),
    "wsd": 1e-3 * (1 - np.sqrt(np.clip((PART - 0.8) / 0.2, 0, 1))),
    "short wsd": 1e-3 * (1 - np.sqrt(np.clip((PART - 0.9) / 0.1, 0, 1))),
    "cosine": 5e-4 * (1 + np.cos(np.pi * PART)),
}
COMPUTE = (STEPS + 1) * 0.005


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_falling_learning_rate_is_not_blurred(schedule: str) -> None:
    """A tenth of the loss hangs on the rate; its fall lowers no point before it, and raises none after."""
    rate = SCHEDULES[schedule]
    true = (0.5 + COMPUTE**-0.3) * (1 + 0.1 * rate / 1e-3)
    late = PART > 0.7
    known, unknown = smoothed(COMPUTE, true, rate) / true - 1, smoothed(COMPUTE, true) / true - 1
    assert np.abs(known[late]).max() < 0.003
    if schedule != "cosine":
        assert np.abs(unknown[late]).max() > 0.02
    noisy = [true * (1 + 0.05 * np.random.default_rng(seed).standard_normal(true.size)) for seed in range(30)]
    ends = np.array([smoothed(COMPUTE, loss, rate)[-1] / true[-1] - 1 for loss in noisy])
    assert abs(ends.mean()) < 0.004
    assert ends.std() < 0.2 * 0.05


def test_rates_that_are_not_known_change_nothing() -> None:
    loss = 1 + COMPUTE**-0.3 + 0.1 * np.random.default_rng(0).standard_normal(COMPUTE.size)
    plain = smoothed(COMPUTE, loss)
    assert np.array_equal(smoothed(COMPUTE, loss, np.full(COMPUTE.size, np.nan)), plain)
    assert np.array_equal(smoothed(COMPUTE, loss, np.full(COMPUTE.size, 2e-4)), plain)
    assert np.array_equal(smoothed(COMPUTE, loss, np.zeros(COMPUTE.size)), plain)
    assert plain.shape == COMPUTE.shape and plain.dtype == np.float64


def test_far_points_stay_as_they_are() -> None:
    """Evaluations at 1, 2, 4, … of the compute, or while the rate decays, have no neighbours to share with."""
    compute = 2.0 ** np.arange(6)
    loss = np.array([9.0, 3.0, 4.0, 2.0, 2.5, 1.0])
    assert smoothed(compute, loss) == pytest.approx(loss, rel=1e-9)
    decaying = smoothed(np.array([1.0, 1.01, 1.02]), np.array([2.0, 1.5, 1.2]), np.array([1e-3, 5e-4, 0.0]))
    assert decaying == pytest.approx([2.0, 1.5, 1.2], rel=1e-6)


def test_a_million_points_are_drawn_at_a_few_hundred_places() -> None:
    compute = np.arange(1, 1_000_001) * 1e-3
    rate = np.where(compute < 800, 1e-3, 1e-5)
    place, fit = smooth(compute, 1 + compute**-0.3, rate)
    assert 100 < place.size == fit.size < 1000
    assert np.all(np.diff(place) > 0)
    assert fit == pytest.approx(1 + place**-0.3, rel=2e-3)
