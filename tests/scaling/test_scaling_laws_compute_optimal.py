from __future__ import annotations

import numpy as np
import pytest
from law_surfaces import COST, SIZES, joint_points
from scipy import stats
from scipy.optimize import minimize_scalar

from hpcm_scale.scaling.laws.compute_optimal import Cost, compute_optimal, fit_cost
from hpcm_scale.scaling.laws.fits import fit_parameters_and_data
from hpcm_scale.scaling.laws.law import CannotFit


@pytest.fixture(scope="module")
def joint():
    return fit_parameters_and_data(joint_points(0.003 * np.random.default_rng(1).standard_normal(18)))


def test_with_six_n_d_it_is_chinchillas_formula(joint):
    """Hoffmann et al. 2022, equation 4: N* = G·(C/6)^a, D* = (C/6)^b/G, G = (αA/βB)^(1/(α+β))."""
    e, a, alpha, b, beta = (joint.parameters[name] for name in ("E", "A", "alpha", "B", "beta"))
    law = compute_optimal(joint, Cost.exact(6, 1), (1e-3, 1e3))
    pflops = np.array([1e-2, 1.0, 1e6])
    g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    parameters = g * (1e15 * pflops / 6) ** (beta / (alpha + beta))
    pixels = (1e15 * pflops / 6) ** (alpha / (alpha + beta)) / g
    np.testing.assert_allclose(law.optimum(pflops).parameters, parameters, rtol=1e-11)
    np.testing.assert_allclose(law.optimum(pflops).pixels, pixels, rtol=1e-11)
    np.testing.assert_allclose(law.predict(pflops).value, e + a * parameters**-alpha + b * pixels**-beta, rtol=1e-11)
    assert law.growth == pytest.approx((beta / (alpha + beta), alpha / (alpha + beta)))


def test_no_other_split_of_the_budget_is_better(joint):
    k, kappa = COST
    law = compute_optimal(joint, Cost.exact(k, kappa), (1e-3, 1e3))
    for pflops in (0.05, 3.0, 1e4):

        def loss(log_parameters: float, budget: float = pflops) -> float:
            size = np.exp(log_parameters)
            return joint.predict((size, 1e15 * budget / (k * size**kappa))).value

        best = minimize_scalar(loss, bracket=(10, 15), tol=1e-12)
        optimum = law.optimum(pflops)
        assert optimum.parameters == pytest.approx(np.exp(best.x), rel=1e-5)
        assert k * optimum.parameters**kappa * optimum.pixels == pytest.approx(1e15 * pflops)
        assert law.predict(pflops).value == pytest.approx(best.fun, rel=1e-12)
        a, b = law.growth
        assert law.optimum(10 * pflops).parameters / optimum.parameters == pytest.approx(10**a)
        assert law.optimum(10 * pflops).pixels / optimum.pixels == pytest.approx(10**b)


def test_its_derivatives_are_right(joint):
    """By each of the seven parameters, with the split re-optimised: what the envelope theorem allows to skip."""
    law = compute_optimal(joint, Cost.exact(*COST), (1e-3, 1e3))
    at = np.array([0.1, 100.0])
    _, gradient = law.log_loss(at)
    assert list(law.parameters) == ["E", "A", "alpha", "B", "beta", "k", "kappa"]
    for index, (name, value) in enumerate(law.parameters.items()):
        ends = []
        for sign in (1, -1):
            moved = law.parameters | {name: value * (1 + sign * 1e-6)}
            ends.append(type(law)(**(law.__dict__ | {"parameters": moved})).log_loss(at)[0])
        np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / (2e-6 * value), rtol=1e-5)


def test_its_interval_is_that_of_the_joint_law_widened_by_the_cost(joint):
    exact = compute_optimal(joint, Cost.exact(*COST), (1e-3, 1e3))
    same = joint.predict(tuple(exact.optimum(50.0)))
    assert exact.predict(50.0) == pytest.approx(same)
    unsure = Cost(*COST, ((0.0, 0.0), (0.0, 0.05**2)), None)
    wide, narrow = compute_optimal(joint, unsure, (1e-3, 1e3)), exact
    halves = [np.log(law.predict(50.0).high / law.predict(50.0).value) for law in (wide, narrow)]
    by_kappa = wide.log_loss(50.0)[1][-1] * 0.05 * stats.t.ppf(0.975, joint.degrees_of_freedom)
    assert halves[0] ** 2 - halves[1] ** 2 == pytest.approx(by_kappa**2)
    assert wide.standard_errors["kappa"] == pytest.approx(0.05)


def test_n_d_and_exponents_have_intervals_that_belong_together(joint):
    """With an exact cost, log D* = log(C/k) − κ·log N* and b = 1 − κ·a: the errors differ by the factor κ."""
    k, kappa = COST
    law, pflops = compute_optimal(joint, Cost.exact(k, kappa), (1e-3, 1e3)), 50.0
    size, data = law.optimum_intervals(pflops)
    assert (size.value, data.value) == pytest.approx(tuple(law.optimum(pflops)))
    assert size.low < size.value < size.high
    assert k * size.high**kappa * data.low == pytest.approx(1e15 * pflops)
    assert k * size.low**kappa * data.high == pytest.approx(1e15 * pflops)
    assert np.log(size.high / size.value) == pytest.approx(np.log(size.value / size.low))
    a, b = law.growth_intervals(0.8)
    assert (a.value, b.value) == pytest.approx(law.growth)
    assert (kappa * a.high + b.low, kappa * a.low + b.high) == pytest.approx((1, 1))
    alpha, beta = (joint.parameters[name] for name in ("alpha", "beta"))
    gradient = np.array([0, 0, -beta, 0, alpha]) / (alpha + kappa * beta) ** 2  # of a by E, A, α, B, β
    error = np.sqrt(gradient @ np.array(joint.covariance) @ gradient)
    assert a.high - a.value == pytest.approx(stats.t.ppf(0.9, 13) * error)
    narrow = law.optimum_intervals(pflops, 0.5)[0]
    assert size.low < narrow.low < narrow.high < size.high


def test_compute_for_a_loss_inverts_the_law(joint):
    law = compute_optimal(joint, Cost.exact(*COST), (1e-3, 1e3))
    for pflops in (0.01, 3.0, 1e6):
        ahead = law.predict(pflops)
        found = law.compute_for(ahead.value)
        assert found.value == pytest.approx(pflops)
        assert found.low < found.value < found.high
    floor, error = law.parameters["E"], law.standard_errors["E"]
    assert law.compute_for(floor) == law.compute_for(0.1) == (np.inf, np.inf, np.inf)
    near = law.compute_for(floor + error)  # within the error of E: perhaps no compute reaches it
    assert np.isfinite(near.value) and near.high == np.inf
    without = compute_optimal(type(joint)(**(joint.__dict__ | {"covariance": None})), Cost.exact(*COST), (1, 2))
    assert np.isnan(without.optimum_intervals(1.0)[0].low)


def test_the_cost_is_measured(joint):
    """The two sizes of the public implementation: training costs grow as N^0.79, not as N."""
    parameters = np.array([68_505_299, 1_000_328_003])
    macs = np.array([918.56e3, 7670.8e3])
    cost = fit_cost(parameters.astype(float), 6 * macs)
    assert cost.kappa == pytest.approx(0.79, abs=0.005)
    np.testing.assert_allclose(cost.k * parameters**cost.kappa, 6 * macs)
    assert cost.covariance == ((0.0, 0.0), (0.0, 0.0))
    noisy = fit_cost(SIZES, 40 * SIZES**0.8 * np.exp(0.05 * np.random.default_rng(2).standard_normal(SIZES.size)))
    assert abs(noisy.kappa - 0.8) < 3 * noisy.covariance[1][1] ** 0.5 < 0.2
    assert 0.01 < noisy.residual_deviation < 0.12
    rough = Cost(noisy.k, noisy.kappa, noisy.covariance, 0.12)
    assert "deviates from k·N^κ by 12%" in compute_optimal(joint, rough, (1, 2)).warnings[-1]
    with pytest.raises(CannotFit, match="two sizes"):
        fit_cost(SIZES[[0, 0]], SIZES[[0, 0]])


def test_without_something_to_balance_there_is_no_optimum(joint):
    useless = type(joint)(**(joint.__dict__ | {"parameters": joint.parameters | {"B": 0.0}}))
    with pytest.raises(CannotFit, match="no compute-optimal split"):
        compute_optimal(useless, Cost.exact(6, 1), (1, 2))
    with pytest.raises(CannotFit, match="no compute-optimal split"):
        compute_optimal(joint, Cost.exact(6, -0.1), (1, 2))
