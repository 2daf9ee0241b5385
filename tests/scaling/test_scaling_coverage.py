"""How often intervals hold the truth, by simulation; 1,000 simulations a line: benchmarks/scaling_coverage.py."""

from __future__ import annotations

import numpy as np
import pytest
from law_surfaces import AMOUNTS, COST, SIZES, floor_surface, joint_points, joint_surface, size_points
from scipy.optimize import minimize_scalar

from hpcm_scale.scaling.laws.compute_optimal import Cost, compute_optimal
from hpcm_scale.scaling.laws.fits import bounded, fit_parameters_and_data, fit_power_law, fit_saturating_power_law

PAPER = np.array([68.5e6, 120e6, 246e6, 544e6, 1000e6])
"""The five sizes of arXiv 2508.09075."""


def holds(prediction, truth: float) -> bool:
    return prediction.low <= truth <= prediction.high


def test_power_law_intervals_hold_as_often_as_they_say():
    generator, five, ahead, levels = np.random.default_rng(0), np.geomspace(2e5, 2e7, 5), 2e8, (0.8, 0.95)
    found = []
    for _ in range(2000):
        law = fit_power_law(size_points(3 * five**-0.1 * np.exp(0.01 * generator.standard_normal(5)), five))
        new = 3 * ahead**-0.1 * np.exp(0.01 * generator.standard_normal())
        found.append([holds(law.predict(ahead, level), new) for level in levels])
    assert np.mean(found, axis=0) == pytest.approx(levels, abs=0.018)  # two standard errors at 80 %


@pytest.mark.parametrize(
    ("floor", "noise"),
    [
        (0.55, 0.001),
        (0.55, 0.003),
        pytest.param(0.55, 0.01, marks=pytest.mark.launch),
        pytest.param(0.0, 0.003, marks=pytest.mark.launch),
    ],
)
def test_the_interval_at_ten_times_covers_a_weak_irreducible_loss(floor, noise):
    """The paper's five sizes, 0.55 + 2·N^−0.15, where a power law alone covers 23 % at 0.1 % of noise; and E = 0."""
    generator, ahead = np.random.default_rng(1), 10 * PAPER[-1]
    truth, losses = (floor + 2.0 * x**-0.15 for x in (ahead, PAPER))
    used, alone, new = [], [], []
    for _ in range(200):
        points = size_points(losses * np.exp(noise * generator.standard_normal(5)), PAPER)
        laws = fit_power_law(points), fit_saturating_power_law(points)
        prediction = bounded(*laws, lambda law: law.predict(ahead))
        assert prediction.low <= prediction.value <= prediction.high
        used.append(holds(prediction, truth))
        new.append(holds(prediction, truth * np.exp(noise * generator.standard_normal())))
        alone.append(holds(laws[0].predict(ahead), truth))
    assert np.mean(used) >= 0.92
    assert np.mean(new) >= 0.91
    if floor and noise < 0.01:
        assert np.mean(alone) < 0.7


def test_a_power_law_on_a_floor_holds_hardly_ever():
    """The interval knows nothing of a wrong form."""
    generator, ahead = np.random.default_rng(2), 10 * SIZES[-1]
    found = []
    for _ in range(300):
        law = fit_power_law(size_points(floor_surface(SIZES, 0.6, 0.15) * np.exp(0.002 * generator.standard_normal(6))))
        found.append(holds(law.predict(ahead), floor_surface(ahead, 0.6, 0.15)))
    assert np.mean(found) < 0.3


def test_parameters_lie_within_their_standard_errors():
    generator = np.random.default_rng(4)
    scores = []
    for _ in range(100):
        sizes = np.geomspace(2e5, 2e7, 12)
        law = fit_saturating_power_law(
            size_points(floor_surface(sizes, 0.4) * np.exp(0.002 * generator.standard_normal(12)), sizes)
        )
        scores.append((law.parameters["alpha"] - 0.3) / law.standard_errors["alpha"])
    assert abs(np.mean(scores)) < 0.35
    assert 0.8 < np.std(scores) < 1.4


@pytest.mark.launch
def test_the_joint_and_the_compute_optimal_law_cover():
    """New trainings at three times size and data; N*, D*, exponents, L* and the compute for it at ten times."""
    (k, kappa), noise, generator = COST, 0.003, np.random.default_rng(3)
    ahead, budget = (3 * SIZES[-1], 3 * AMOUNTS[-1]), 10 * k * SIZES[-1] ** kappa * AMOUNTS[-1] / 1e15

    def along(log_size: float) -> float:
        return joint_surface(np.exp(log_size), 1e15 * budget / (k * np.exp(kappa * log_size)))

    best = minimize_scalar(along, bracket=(14, 20), tol=1e-12)
    size, least = np.exp(best.x), best.fun
    growth = 0.4 / (0.25 + kappa * 0.4)
    hits = []
    for _ in range(200):
        law = fit_parameters_and_data(joint_points(noise * generator.standard_normal(18)))
        optimal = compute_optimal(law, Cost.exact(k, kappa), (1e-3, budget / 10))
        new = joint_surface(*ahead) * np.exp(noise * generator.standard_normal())
        parameters, pixels = optimal.optimum_intervals(budget)
        pairs = (
            (law.predict(ahead), new),
            (parameters, size),
            (pixels, 1e15 * budget / (k * size**kappa)),
            (optimal.growth_intervals()[0], growth),
            (optimal.growth_intervals()[1], 1 - kappa * growth),
            (optimal.predict(budget), least),
            (optimal.compute_for(least), budget),
        )
        hits.append([holds(prediction, truth) for prediction, truth in pairs])
    assert np.min(np.mean(hits, axis=0)) >= 0.92, np.mean(hits, axis=0)
