"""What the intervals hold, by simulation, and what is said of trainings left out."""

from __future__ import annotations

import numpy as np
import pytest
from law_surfaces import AMOUNTS, SIZES, floor_surface, joint_points, joint_surface, size_points

from hpcm_scale.scaling.diagnostics import bootstrap, diagnose
from hpcm_scale.scaling.laws.fits import fit_parameters_and_data, fit_power_law, fit_saturating_power_law
from hpcm_scale.scaling.laws.law import CannotFit, Points


def held(law, x, true: float, noise: float, generator: np.random.Generator, level: float = 0.95) -> bool:
    """Whether one new training at `x` lies in the law's interval."""
    _, low, high = law.predict(x, level)
    return low <= true * np.exp(noise * generator.standard_normal()) <= high


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_power_law_intervals_hold_as_often_as_they_say(level):
    generator, five, ahead = np.random.default_rng(0), np.geomspace(2e5, 2e7, 5), 2e8
    found = []
    for _ in range(2000):
        law = fit_power_law(size_points(3 * five**-0.1 * np.exp(0.01 * generator.standard_normal(5)), five))
        found.append(held(law, ahead, 3 * ahead**-0.1, 0.01, generator, level))
    assert np.mean(found) == pytest.approx(level, abs=0.018)  # two standard errors at 80 %


@pytest.mark.parametrize(("floor", "noise"), [(0.3, 0.003), (0.6, 0.02)])
def test_floor_intervals_hold_ten_times_ahead(floor, noise):
    generator, ahead = np.random.default_rng(1), 10 * SIZES[-1]
    found = []
    for _ in range(150):
        law = fit_saturating_power_law(
            size_points(floor_surface(SIZES, floor) * np.exp(noise * generator.standard_normal(6)))
        )
        found.append(held(law, ahead, floor_surface(ahead, floor), noise, generator))
    assert 0.91 <= np.mean(found) <= 0.99


def test_a_power_law_on_a_floor_holds_hardly_ever():
    """The interval knows nothing of a wrong form."""
    generator, ahead = np.random.default_rng(2), 10 * SIZES[-1]
    found = []
    for _ in range(300):
        law = fit_power_law(size_points(floor_surface(SIZES, 0.6, 0.15) * np.exp(0.002 * generator.standard_normal(6))))
        found.append(held(law, ahead, floor_surface(ahead, 0.6, 0.15), 0.002, generator))
    assert np.mean(found) < 0.3


@pytest.mark.launch
@pytest.mark.parametrize("trials", [20, pytest.param(60, marks=pytest.mark.long)])
def test_joint_intervals_hold_three_times_ahead(trials):
    generator = np.random.default_rng(3)
    ahead = 3 * SIZES[-1], 3 * AMOUNTS[-1]
    found = []
    for _ in range(trials):
        law = fit_parameters_and_data(joint_points(0.005 * generator.standard_normal(18)))
        found.append(held(law, ahead, joint_surface(*ahead), 0.005, generator))
    assert np.mean(found) >= 0.88


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


def test_leaving_one_out_is_fitting_the_others():
    loss = floor_surface(SIZES, 0.4) * np.exp(0.003 * np.random.default_rng(5).standard_normal(6))
    points = size_points(loss)
    for fit in (fit_power_law, fit_saturating_power_law):
        trust = diagnose(fit, points, fit(points))
        assert [each.run for each in trust.leave_one_out] == list(points.runs)
        for index, each in enumerate(trust.leave_one_out):
            others = np.delete(np.arange(6), index)
            prediction = fit(size_points(loss[others], SIZES[others])).predict(SIZES[index])
            assert (each.predicted, each.low, each.high) == prediction
            assert each.inside == (prediction.low <= loss[index] <= prediction.high)
            assert each.error == pytest.approx(prediction.value / loss[index] - 1)
        assert trust.largest == trust.leave_one_out[-1:]
        assert trust.largest_refused is None
        residuals = [each.log_residual for each in trust.residuals]
        np.testing.assert_allclose(residuals, np.log(loss / fit(points).predict(SIZES).value), atol=1e-14)


def test_the_largest_held_out_shows_a_floor():
    loss = floor_surface(SIZES, 0.5, 0.3) * np.exp(0.001 * np.random.default_rng(6).standard_normal(6))
    points = size_points(loss)
    line, floor = (diagnose(fit, points, fit(points)).largest[0] for fit in (fit_power_law, fit_saturating_power_law))
    assert line.error < -0.05
    assert floor.inside
    assert abs(floor.error) < 0.005
    assert floor.high - floor.low < 0.3 * (line.high - line.low)


@pytest.mark.launch
def test_the_largest_size_is_held_out_with_all_its_trainings():
    points = joint_points(0.003 * np.random.default_rng(7).standard_normal(18))
    trust = diagnose(fit_parameters_and_data, points, fit_parameters_and_data(points))
    assert [each.x for each in trust.largest] == [(SIZES[-1], amount) for amount in AMOUNTS]
    assert all(each.inside for each in trust.largest)
    assert len(trust.leave_one_out) == 18


def test_what_cannot_be_left_out_is_reported():
    points = size_points(floor_surface(SIZES[:3], 0.4), SIZES[:3])
    trust = diagnose(fit_saturating_power_law, points, fit_saturating_power_law(points))
    assert trust.leave_one_out == trust.largest == ()
    assert trust.largest_refused == "an irreducible loss needs 3 different N, and there are 2 among numbers"
    four = size_points(floor_surface(SIZES[:4], 0.4), SIZES[:4])
    (largest,) = diagnose(fit_saturating_power_law, four, fit_saturating_power_law(four)).largest
    assert (largest.low, largest.high, largest.inside) == (None, None, None)
    assert largest.predicted == pytest.approx(largest.observed, rel=1e-6)


def test_the_bootstrap_resamples_trainings():
    loss = 3 * SIZES**-0.12 * np.exp(0.01 * np.random.default_rng(8).standard_normal(6))
    points, calls = size_points(loss), []
    found = bootstrap(fit_power_law, points, 400, advance=lambda: calls.append(1))
    again = bootstrap(fit_power_law, points, 400)
    assert found == again
    assert len(calls) == found.resamples == 400
    assert (found.unit, found.at) == ("runs", (10 * SIZES[-1],))
    law = fit_power_law(points)
    low, high = found.parameters["alpha"]
    assert low < law.parameters["alpha"] < high
    error = law.standard_errors["alpha"]
    assert 1.0 * error < high - low < 6 * error
    assert found.at_ten_times[0] < law.predict(found.at[0]).value < found.at_ten_times[1]
    narrower = bootstrap(fit_power_law, points, 400, level=0.5)
    assert low < narrower.parameters["alpha"][0] < narrower.parameters["alpha"][1] < high


def test_the_bootstrap_draws_seeds_within_sizes():
    sizes = np.repeat(SIZES[:3], 4)
    generator = np.random.default_rng(9)
    points = size_points(3 * sizes**-0.12 * np.exp(0.01 * generator.standard_normal(12)), sizes)
    seen = []

    def fit(drawn: Points):
        seen.append(drawn)
        return fit_saturating_power_law(drawn)

    found = bootstrap(fit, points, 20)
    assert (found.unit, found.failed) == ("seeds within each size", 0)
    assert all(np.array_equal(drawn.variables["N"], sizes) for drawn in seen)
    assert len({drawn.runs for drawn in seen}) > 15


def test_resamples_without_a_law_are_counted():
    points = size_points(floor_surface(SIZES[:4], 0.4), SIZES[:4])
    found = bootstrap(fit_saturating_power_law, points, 100)
    assert 20 < found.failed < 50
    three = size_points(floor_surface(SIZES[:3], 0.4), SIZES[:3])
    with pytest.raises(CannotFit, match="of 50 resamples have enough different sizes"):
        bootstrap(fit_saturating_power_law, three, 50)
