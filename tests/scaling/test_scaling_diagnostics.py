"""Residuals and predictions of trainings held out of a fit."""

from __future__ import annotations

import numpy as np
import pytest
from law_surfaces import AMOUNTS, SIZES, floor_surface, joint_points, size_points

from hpcm_scale.scaling.diagnostics import diagnose
from hpcm_scale.scaling.laws.fits import fit_parameters_and_data, fit_power_law, fit_saturating_power_law


def test_leaving_one_out_is_fitting_the_others():
    loss = floor_surface(SIZES, 0.4) * np.exp(0.003 * np.random.default_rng(5).standard_normal(6))
    points = size_points(loss)
    for fit in (fit_power_law, fit_saturating_power_law):
        found = diagnose(fit, points, fit(points))
        assert [each.run for each in found.leave_one_out] == list(points.runs)
        for index, each in enumerate(found.leave_one_out):
            others = np.delete(np.arange(6), index)
            prediction = fit(size_points(loss[others], SIZES[others])).predict(SIZES[index])
            assert (each.predicted, each.low, each.high) == prediction
            assert each.inside == (prediction.low <= loss[index] <= prediction.high)
            assert each.error == pytest.approx(prediction.value / loss[index] - 1)
        assert found.largest == found.leave_one_out[-1:]
        assert found.largest_refused is None
        residuals = [each.log_residual for each in found.residuals]
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
    found = diagnose(fit_parameters_and_data, points, fit_parameters_and_data(points))
    assert [each.x for each in found.largest] == [(SIZES[-1], amount) for amount in AMOUNTS]
    assert all(each.inside for each in found.largest)
    assert len(found.leave_one_out) == 18


def test_what_cannot_be_left_out_is_reported():
    points = size_points(floor_surface(SIZES[:3], 0.4), SIZES[:3])
    found = diagnose(fit_saturating_power_law, points, fit_saturating_power_law(points))
    assert found.leave_one_out == found.largest == ()
    assert found.largest_refused == "an irreducible loss needs 3 different N, and there are 2 among numbers"
    four = size_points(floor_surface(SIZES[:4], 0.4), SIZES[:4])
    (largest,) = diagnose(fit_saturating_power_law, four, fit_saturating_power_law(four)).largest
    assert (largest.low, largest.high, largest.inside) == (None, None, None)
    assert largest.predicted == pytest.approx(largest.observed, rel=1e-6)
