from __future__ import annotations

import math

import numpy as np
import pytest
from law_surfaces import SIZES, floor_surface, size_points

from hpcm_scale.scaling.laws.fits import aicc, compare, fit_power_law, fit_saturating_power_law, huber_inflation


def both(loss, sizes=SIZES):
    points = size_points(loss, sizes)
    return fit_power_law(points), fit_saturating_power_law(points)


def noisy(floor: float, number: int, generator: np.random.Generator, scatter: float = 0.005):
    sizes = np.geomspace(SIZES[0], SIZES[-1], number)
    return floor_surface(sizes, floor) * np.exp(scatter * generator.standard_normal(number)), sizes


def test_aicc_is_that_of_the_likelihood():
    """−2·log-likelihood of normal residuals at the variance that fits best + 2K + 2K(K + 1)/(n − K − 1)."""
    residuals = np.array([0.01, -0.02, 0.015, 0.005, -0.01, 0.02, -0.005])
    variance = np.mean(residuals**2)
    likelihood = np.sum(-0.5 * np.log(2 * np.pi * variance) - residuals**2 / (2 * variance))
    for parameters in (2, 3):
        k = parameters + 1
        full = -2 * likelihood + 2 * k + 2 * k * (k + 1) / (7 - k - 1)
        assert aicc(residuals, parameters) == pytest.approx(full - 7 * (1 + math.log(2 * math.pi)))
    assert aicc(residuals[:5], 2) is not None
    assert aicc(residuals[:4], 2) is None
    assert aicc(residuals[:5], 3) is None
    assert aicc(residuals[:6], 3) is not None
    assert math.isfinite(aicc(np.zeros(7), 2))


def test_with_enough_sizes_aicc_tells_a_floor_from_none():
    generator = np.random.default_rng(3)
    with_floor = [compare(*both(*noisy(0.4, 9, generator))) for _ in range(20)]
    without = [compare(*both(*noisy(0.0, 9, generator))) for _ in range(40)]
    assert all(
        each.preferred == "saturating_power_law_of_parameters" and each.aicc_difference < 0 for each in with_floor
    )
    assert sum(each.preferred == "power_law_of_parameters" for each in without) >= 36


def test_where_aicc_overlooks_a_floor_the_f_test_decides():
    generator = np.random.default_rng(4)
    found = [compare(*both(*noisy(0.4, 6, generator))) for _ in range(20)]
    assert all(each.f_probability < 0.05 for each in found)
    criteria_disagree = [each for each in found if each.criteria_disagree]
    assert len(criteria_disagree) > 10
    assert all(
        each.preferred == "saturating_power_law_of_parameters" and each.aicc_difference > 0
        for each in criteria_disagree
    )
    assert (
        "without irreducible loss, but with 6 trainings it can miss one, and an F test rejects"
        in criteria_disagree[0].reason
    )


def test_the_f_test_seldom_sees_a_floor_that_is_not_there():
    generator = np.random.default_rng(5)
    found = [compare(*both(*noisy(0.0, number, generator))) for number in (5, 6) * 75]
    rejected = [each.f_probability < 0.05 for each in found]
    assert np.mean(rejected) < 0.09
    assert [
        each.criteria_disagree or each.preferred == "saturating_power_law_of_parameters" for each in found
    ] == rejected


def test_a_power_law_alone_is_preferred_to_nothing():
    line = fit_power_law(size_points(np.array([2.0, 1.0]), SIZES[:2]))
    assert compare(line, None).preferred == "power_law_of_parameters"
    alone, floor = both(floor_surface(SIZES[:3], 0.4), SIZES[:3])
    assert (compare(alone, floor).preferred, compare(alone, floor).f_probability) == ("power_law_of_parameters", None)


def test_the_variance_of_hubers_estimate():
    """Simulated: the Huber estimate of a location, from normal values."""
    values = np.random.default_rng(6).standard_normal((2000, 200))
    for delta, centre in ((0.01, np.median(values, axis=1)), (1e3, values.mean(axis=1))):
        assert huber_inflation(delta, 1.0) == pytest.approx(200 * np.var(centre), rel=0.08)
    assert huber_inflation(None, 1.0) == 1
    assert huber_inflation(1e-9, 1.0) == pytest.approx(math.pi / 2)
    assert huber_inflation(1e-3, 0.0) == pytest.approx(1)
    assert huber_inflation(1.345, 1.0) == pytest.approx(1 / 0.95, rel=1e-3)  # Huber's 95 % efficiency
