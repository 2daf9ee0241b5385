from __future__ import annotations

import numpy as np
import pytest
from law_surfaces import AMOUNTS, SIZES, columns, joint_points, joint_surface, points_of
from scipy.optimize import least_squares, minimize
from scipy.special import huber, logsumexp

from hpcm_scale.scaling.laws.compute_optimal import Cost, compute_optimal
from hpcm_scale.scaling.laws.fits import fit_parameters_and_data
from hpcm_scale.scaling.laws.law import EXPONENTS, CannotFit, Points

DELTA = 1e-3


def chinchilla_points(shared) -> Points:
    """Besiroglu et al. 2024 (arXiv 2404.10102): points read off a figure of Hoffmann et al., D = C/6N."""
    path = shared / "known_answers" / "svg_extracted_data.csv"
    parameters, compute, loss = columns(path, "Model Size", "Training FLOP", "loss")
    kept = np.argsort(loss)[:-5]
    parameters, compute, loss = parameters[kept], compute[kept], loss[kept]
    return points_of(loss, "parameters_and_data", N=parameters, D=compute / (6 * parameters))


def public_points(shared, name: str) -> Points:
    folder = shared / "known_answers"
    if name == "kyo":
        parameters, data, loss = columns(folder / "kyo_llm_df.csv", "N", "D", "loss")
    else:
        path = folder / "gadre_openlm_104.csv"
        parameters, data, loss = columns(path, "N", "D", "loss_c4_val", dataset=name)
    return points_of(loss, "parameters_and_data", N=parameters, D=data)


def objective(law, points: Points) -> float:
    """Huber's loss of log L, summed, by scipy and from the numbers that laws.json would hold."""
    e, a, alpha, b, beta = (law.parameters[name] for name in ("E", "A", "alpha", "B", "beta"))
    value = e + a * points.variables["N"] ** -alpha + b * points.variables["D"] ** -beta
    return float(huber(DELTA, np.log(points.loss / value)).sum())


def by_logsumexp(points: Points) -> tuple[float, np.ndarray]:
    """Hoffmann et al.'s own way: BFGS over (log E, log A, log B, α, β) from two starts, restarted until it rests."""
    log_n, log_d = np.log(points.variables["N"]), np.log(points.variables["D"])

    def scaled(theta: np.ndarray) -> tuple[float, np.ndarray]:
        e, a, b, alpha, beta = theta
        terms = np.stack([np.full_like(log_n, e), a - alpha * log_n, b - beta * log_d])
        value = logsumexp(terms, axis=0)
        shares, residuals = np.exp(terms - value), value - np.log(points.loss)
        pull = np.clip(residuals, -DELTA, DELTA)
        by_a, by_b = pull * shares[1], pull * shares[2]
        gradient = [(pull * shares[0]).sum(), by_a.sum(), by_b.sum(), -(by_a * log_n).sum(), -(by_b * log_d).sum()]
        return 1e3 * huber(DELTA, residuals).sum(), 1e3 * np.array(gradient)

    results = []
    for exponent in (0.2, 0.5):
        theta = np.array([0.3, exponent * log_n.mean(), exponent * log_d.mean(), exponent, exponent])
        for _ in range(5):
            result = minimize(scaled, theta, jac=True, method="BFGS", options={"gtol": 1e-11, "maxiter": 3000})
            theta = result.x
        results.append(result)
    best = min(results, key=lambda result: result.fun)
    e, a, b, alpha, beta = best.x
    return best.fun / 1e3, np.array([np.exp(e), np.exp(a), alpha, np.exp(b), beta])


def test_the_optimum_known_for_chinchillas_points(shared):
    points = chinchilla_points(shared)
    assert len(points) == 240
    law = fit_parameters_and_data(points)
    assert objective(law, points) == pytest.approx(0.001018274018, abs=1e-9)
    assert objective(law, points) < 0.0010182740181  # and to the last digit that is known
    known = {"E": 1.81722, "A": 477.83, "alpha": 0.34731, "B": 2143.42, "beta": 0.36717}
    assert law.parameters == pytest.approx(known, rel=1e-5)
    assert law.converged
    assert law.warnings == ()


def test_rounding_what_is_published_is_not_harmless(shared):
    """Why laws.json holds every digit."""
    points = chinchilla_points(shared)
    law = fit_parameters_and_data(points)
    rounded = {"E": 1.82, "A": 478.0, "alpha": 0.35, "B": 2143.0, "beta": 0.37}
    assert objective(type(law)(**(law.__dict__ | {"parameters": rounded})), points) > 3 * objective(law, points)


@pytest.mark.parametrize("name", ["svg", "kyo", "c4_original"])
def test_a_second_implementation_agrees(shared, name):
    points = chinchilla_points(shared) if name == "svg" else public_points(shared, name)
    law = fit_parameters_and_data(points)
    best, parameters = by_logsumexp(points)
    assert objective(law, points) == pytest.approx(best, abs=1e-11)
    assert list(law.parameters.values()) == pytest.approx(parameters, rel=1e-5)


def test_without_noise_it_finds_the_parameters():
    law = fit_parameters_and_data(joint_points())
    assert (law.parameters["E"], law.parameters["alpha"], law.parameters["beta"]) == pytest.approx((0.5, 0.25, 0.4))
    assert law.predict((1e9, 1e11)).value == pytest.approx(joint_surface(1e9, 1e11))
    grid = law.predict((SIZES[:, None], AMOUNTS))
    np.testing.assert_allclose(grid.value, joint_surface(SIZES[:, None], AMOUNTS), rtol=1e-9)


@pytest.mark.parametrize(("noise", "seed"), [(0.05, 13), (0.1, 25), (0.1, 116)])
def test_it_is_not_caught_in_a_local_optimum(noise, seed):
    """Here polishing the best place of the grid alone is: least squares from sixteen places finds better ones."""
    points = joint_points(noise * np.random.default_rng(seed).standard_normal(18))
    sizes, amounts = points.variables["N"] / 2e6, points.variables["D"] / 1e9

    def residuals(theta: np.ndarray) -> np.ndarray:
        value = theta[0] + theta[1] * sizes ** -theta[2] + theta[3] * amounts ** -theta[4]
        return np.log(value / points.loss)

    bounds = [0, 0, *EXPONENTS[:1], 0, *EXPONENTS[:1]], [np.inf, np.inf, *EXPONENTS[1:], np.inf, *EXPONENTS[1:]]
    keywords = {"bounds": bounds, "loss": "huber", "f_scale": DELTA}
    starts = [[0.5, 0.3, alpha, 0.2, beta] for alpha in (0.05, 0.2, 0.5, 1.5) for beta in (0.05, 0.2, 0.5, 1.5)]
    best = min(least_squares(residuals, start, **keywords).cost for start in starts)
    assert objective(fit_parameters_and_data(points), points) < best * (1 + 1e-6)


def test_an_outlier_hardly_moves_it():
    outlier = np.zeros(18)
    outlier[7] = 0.3
    noise = 1e-4 * np.random.default_rng(0).standard_normal(18)
    law = fit_parameters_and_data(joint_points(noise + outlier))
    assert law.predict((1e8, 1e11)).value == pytest.approx(joint_surface(1e8, 1e11), rel=2e-3)


def test_what_does_not_determine_it_is_refused():
    points = joint_points()
    two_amounts = points.take(np.flatnonzero(points.variables["D"] < AMOUNTS[-1]))
    with pytest.raises(CannotFit, match="there are 6, 2 and 12"):
        fit_parameters_and_data(two_amounts)
    with pytest.raises(CannotFit, match="there are 2, 3 and 6"):
        fit_parameters_and_data(points.take(np.flatnonzero(points.variables["N"] < SIZES[2])))
    close = points.variables | {"D": 1e9 * (points.variables["D"] / 1e9) ** 0.2}
    with pytest.raises(CannotFit, match="differ by a factor of 3, and they differ by 2"):
        fit_parameters_and_data(points_of(joint_surface(close["N"], close["D"]), "parameters_and_data", **close))
    edge = fit_parameters_and_data(
        points_of(points.loss + 1e3 * (points.variables["N"] == SIZES[0]), "parameters_and_data", **points.variables)
    )
    assert edge.at_bound
    with pytest.raises(CannotFit, match="at a bound of its range"):
        compute_optimal(edge, Cost.exact(6, 1), (1.0, 10.0))
    few = fit_parameters_and_data(points)
    assert not few.at_bound
    assert few.warnings == ("3 amounts of training data hardly determine the irreducible loss E and the exponents",)
