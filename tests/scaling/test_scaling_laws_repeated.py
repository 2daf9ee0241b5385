from __future__ import annotations

import numpy as np
import pytest
from law_surfaces import points_of

from hpcm_scale.scaling.laws.law import CannotFit
from hpcm_scale.scaling.laws.repeated import effective_pixels, fit_repeated

PLACES = np.meshgrid(np.geomspace(5e5, 2e7, 3), np.geomspace(3e8, 3e10, 4), [1e9, 1e12], indexing="ij")
N, D, U = (axis.ravel() for axis in PLACES)


def loss(size, pixels, unique, repetitions):
    effective, _ = effective_pixels(np.asarray(pixels), np.asarray(unique), repetitions)
    return 0.5 + 0.3 * (size / 2e6) ** -0.25 + 0.2 * (effective / 1e9) ** -0.4


def points(repetitions=12.0, noise=0.0, chosen=slice(None)):
    draw = np.random.default_rng(0).standard_normal(N.size)
    values = loss(N, D, U, repetitions) * np.exp(noise * draw)
    return points_of(values[chosen], "parameters_and_data", N=N[chosen], D=D[chosen])


def test_effective_pixels():
    """New pixels count fully, a second epoch almost, and in the end a set is worth U·(1 + R*)."""
    pixels = np.array([5e8, 1e9, 2e9, 1e13])
    effective, slope = effective_pixels(pixels, np.full(4, 1e9), 15.0)
    np.testing.assert_allclose(effective, [5e8, 1e9, 1e9 * (16 - 15 * np.exp(-1 / 15)), 1.6e10])
    step = effective_pixels(pixels, np.full(4, 1e9), 15.001)[0] - effective_pixels(pixels, np.full(4, 1e9), 14.999)[0]
    np.testing.assert_allclose(slope, step / 0.002, rtol=1e-4, atol=1)


@pytest.mark.parametrize("repetitions", [3.0, 40.0])
def test_without_noise_it_finds_the_parameters(repetitions):
    law = fit_repeated(points(repetitions), U)
    assert law.parameters["R"] == pytest.approx(repetitions, rel=1e-3)
    assert (law.parameters["E"], law.parameters["beta"]) == pytest.approx((0.5, 0.4), rel=1e-3)
    assert law.predict((1e8, 1e12, 1e10)).value == pytest.approx(loss(1e8, 1e12, 1e10, repetitions), rel=1e-4)


def test_the_interval_holds_and_the_derivatives_are_right():
    law = fit_repeated(points(noise=0.003), U)
    assert abs(law.parameters["R"] - 12) < 3 * law.standard_errors["R"] < 12
    assert law.degrees_of_freedom == N.size - 6
    at = (np.array([1e6, 1e7]), np.array([5e9, 5e8]), np.array([1e9, 1e9]))
    _, gradient = law.log_loss(at)
    for index, (name, value) in enumerate(law.parameters.items()):
        ends = [
            type(law)(**{**law.__dict__, "parameters": {**law.parameters, name: value * (1 + sign * 1e-6)}}).log_loss(
                at
            )[0]
            for sign in (1, -1)
        ]
        np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / (2e-6 * value), rtol=1e-4, atol=1e-12)
    low, high = law.predict((1e7, 1e12, 1e9))[1:]
    assert low < loss(1e7, 1e12, 1e9, 12.0) < high


@pytest.mark.parametrize(
    ("chosen", "unique", "reason"),
    [
        (U == 1e9, U, "one training set"),
        (slice(None), 1e3 * U, "no run repeats"),
        (np.arange(6), U, "7 trainings"),
        (np.arange(8), U, "needs 3 sizes"),
    ],
)
def test_what_the_runs_cannot_tell_is_refused(chosen, unique, reason):
    with pytest.raises(CannotFit, match=reason):
        fit_repeated(points(chosen=chosen), unique[chosen])


def test_repetition_that_costs_nothing_is_refused():
    with pytest.raises(CannotFit, match="as much as new data"):
        fit_repeated(points(1e9), U)
