"""The saturating power law, and what it and a power law say together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from law_surfaces import SIZES, floor_surface, size_points
from scipy.optimize import curve_fit

from hpcm_scale.scaling.laws.fits import (
    bounded,
    fit_power_law,
    fit_saturating_power_law,
    huber_inflation,
    irreducible_probability,
)
from hpcm_scale.scaling.laws.law import CannotFit, Prediction


@pytest.mark.parametrize(("floor", "alpha"), [(0.05, 0.1), (0.3, 0.3), (0.6, 0.15), (0.9, 0.8)])
def test_without_noise_it_finds_the_parameters(floor, alpha):
    law = fit_saturating_power_law(size_points(floor_surface(SIZES, floor, alpha)))
    found = law.parameters
    assert (found["E"], found["alpha"]) == pytest.approx((floor, alpha), rel=1e-6)
    assert found["A"] == pytest.approx((1 - floor) * SIZES[0] ** alpha, rel=1e-6)
    assert law.converged
    assert law.predict(3e8).value == pytest.approx(floor_surface(3e8, floor, alpha), rel=1e-8)


def test_a_second_implementation_agrees():
    """scipy's curve_fit (Levenberg and Marquardt's method) of log L, with errors of its own."""
    for seed in range(5):
        noise = np.exp(0.003 * np.random.default_rng(seed).standard_normal(SIZES.size))
        loss = floor_surface(SIZES, 0.4) * noise
        law = fit_saturating_power_law(size_points(loss))

        def log_law(x, floor, log_a, alpha):
            return np.log(floor + np.exp(log_a - alpha * np.log(x / SIZES[2])))

        best, covariance = curve_fit(log_law, SIZES, np.log(loss), p0=[0.3, -1, 0.4], xtol=1e-14, ftol=1e-14)
        assert (law.parameters["E"], law.parameters["alpha"]) == pytest.approx((best[0], best[2]), rel=1e-5)
        assert law.parameters["A"] == pytest.approx(np.exp(best[1]) * SIZES[2] ** best[2], rel=1e-4)
        errors = law.standard_errors["E"], law.standard_errors["alpha"]
        assert errors == pytest.approx((covariance[0, 0] ** 0.5, covariance[2, 2] ** 0.5), rel=1e-4)


def test_its_derivatives_are_right():
    law = fit_saturating_power_law(size_points(floor_surface(SIZES, 0.4)))
    _, gradient = law.log_loss(np.array([1e6, 1e8]))
    for index, (name, value) in enumerate(law.parameters.items()):
        ends = []
        for sign in (1, -1):
            moved = law.parameters | {name: value * (1 + sign * 1e-6)}
            ends.append(type(law)(**(law.__dict__ | {"parameters": moved})).log_loss(np.array([1e6, 1e8]))[0])
        np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / (2e-6 * value), rtol=1e-6)


@pytest.mark.parametrize(("floor", "alpha"), [(0.6, 0.15), (0.3, 0.3), (0.6, 0.3), (0.9, 0.3)])
def test_r_proves_nothing(floor, alpha):
    """Noise-free curves with a floor at the paper's five sizes: r near −1, and a gain that is not there."""
    five = np.array([68.5e6, 120.1e6, 246.4e6, 543.6e6, 1000.3e6])
    true = floor_surface(SIZES[0] * five / five[0], floor, alpha)
    now, then = floor_surface(SIZES[0] * np.array([1, 10]) * five[-1] / five[0], floor, alpha)
    line, saturating = both(true, five)
    promised = line.predict(np.array([1, 10]) * five[-1]).value
    assert -0.9997 < line.r < -0.993
    assert 1.2 < (promised[0] - promised[1]) / (now - then) < 2.2
    assert bounded(line, saturating, lambda law: law.predict(10 * five[-1])).value == pytest.approx(then, rel=1e-6)
    assert irreducible_probability(line, saturating) < 1e-6


def both(loss, sizes=SIZES):
    points = size_points(loss, sizes)
    return fit_power_law(points), fit_saturating_power_law(points)


def noisy(floor: float, number: int, generator: np.random.Generator, scatter: float = 0.005):
    sizes = np.geomspace(SIZES[0], SIZES[-1], number)
    return floor_surface(sizes, floor) * np.exp(scatter * generator.standard_normal(number)), sizes


def test_the_f_test_sees_a_clear_floor_and_seldom_one_that_is_not_there():
    generator = np.random.default_rng(3)
    with_floor = [irreducible_probability(*both(*noisy(0.4, 6, generator))) for _ in range(20)]
    without = [irreducible_probability(*both(*noisy(0.0, number, generator))) for number in (5, 6) * 75]
    assert max(with_floor) < 0.05
    assert np.mean(np.array(without) < 0.05) < 0.09
    assert irreducible_probability(*both(floor_surface(SIZES[:3], 0.4), SIZES[:3])) is None


def test_together_they_have_the_greater_lower_bound():
    line, saturating = both(*noisy(0.4, 6, np.random.default_rng(1)))
    for evaluate in (
        lambda law: law.predict(SIZES[-1] * np.array([2, 10])),
        lambda law: law.ratio(SIZES[-1], 10 * SIZES[-1]),
    ):
        found, steep, flat = bounded(line, saturating, evaluate), evaluate(line), evaluate(saturating)
        assert np.array_equal(found.value, flat.value) and np.array_equal(found.high, flat.high)
        assert np.array_equal(found.low, np.maximum(flat.low, steep.low))
    # A floor that sizes barely show: the saturating law alone allows more gain than any power law.
    weak, wide = both(*noisy(0.05, 5, np.random.default_rng(4)))
    ahead = bounded(weak, wide, lambda law: law.predict(10 * SIZES[-1]))
    assert ahead.low == weak.predict(10 * SIZES[-1]).low > wide.predict(10 * SIZES[-1]).low
    assert isinstance(ahead.low, float) and ahead.low < ahead.value < ahead.high
    assert bounded(weak, None, lambda law: law.predict(1e9)) == weak.predict(1e9)
    # Between the points the power law is above the other; half of its interval, too.
    exact = both(0.5 + 2e4 * SIZES**-0.9, SIZES)
    inside = bounded(*exact, lambda law: law.predict(np.geomspace(1e4, 1e12, 500), 0.5))
    assert np.all(inside.low <= inside.value)
    assert np.all(inside.value <= inside.high)
    three = bounded(*both(floor_surface(SIZES[:3], 0.4), SIZES[:3]), lambda law: law.predict(1e9))
    assert np.isnan(three.low) and np.isnan(three.high) and isinstance(three, Prediction)


def test_the_variance_of_hubers_estimate():
    """Simulated: the Huber estimate of a location, from normal values."""
    values = np.random.default_rng(6).standard_normal((2000, 200))
    for delta, centre in ((0.01, np.median(values, axis=1)), (1e3, values.mean(axis=1))):
        assert huber_inflation(delta, 1.0) == pytest.approx(200 * np.var(centre), rel=0.08)
    assert huber_inflation(None, 1.0) == 1
    assert huber_inflation(1e-9, 1.0) == pytest.approx(math.pi / 2)
    assert huber_inflation(1e-3, 0.0) == pytest.approx(1)
    assert huber_inflation(1.345, 1.0) == pytest.approx(1 / 0.95, rel=1e-3)  # Huber's 95 % efficiency


def test_few_sizes_are_refused_or_warned_of():
    with pytest.raises(CannotFit, match="needs 3 different N, and there are 2"):
        fit_saturating_power_law(size_points(floor_surface(SIZES[[0, 0, 3]], 0.4) * [1, 1.01, 1], SIZES[[0, 0, 3]]))
    three = fit_saturating_power_law(size_points(floor_surface(SIZES[:3], 0.4), SIZES[:3]))
    assert "3 points determine 3 parameters exactly: no interval" in three.warnings
    assert np.isnan(three.predict(1e8).high)
    five = fit_saturating_power_law(size_points(floor_surface(SIZES[:5], 0.4), SIZES[:5]))
    assert any(warning.startswith("5 different N hardly determine an irreducible loss") for warning in five.warnings)
    assert fit_saturating_power_law(size_points(floor_surface(SIZES, 0.4))).warnings == ()


def test_solutions_on_a_boundary_are_reported():
    line = fit_saturating_power_law(size_points(SIZES**-0.2 * [1, 1, 1.02, 1.02, 1, 1]))  # bent down in a log-log plot
    assert line.parameters["E"] == 0
    assert any("E = 0" in warning for warning in line.warnings)
    assert np.isfinite(line.predict(1e8).low)
    assert line.parameters["alpha"] == pytest.approx(
        fit_power_law(size_points(SIZES**-0.2)).parameters["alpha"], rel=0.02
    )

    rising = fit_saturating_power_law(size_points(SIZES**0.1))
    assert any("does not fall with N" in warning for warning in rising.warnings)
    assert np.isnan(rising.predict(1e8).low)

    cliff = fit_saturating_power_law(size_points(np.array([9.0, 1, 1, 1, 1, 1])))
    assert any("at a bound of its range" in warning for warning in cliff.warnings)
