"""Fitting L = E + Σ A·x^−α with E, A ≥ 0, to log L, by variable projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import least_squares, nnls

EXPONENTS = (0.01, 4.0)
"""Bounds of every exponent."""
GRID = {1: 48, 2: 10}
"""Exponents tried for each variable, by the number of variables."""
STARTS = {1: 2, 2: 6}
"""Best places of the grid from which the fit is polished: noise makes local optima."""
REWEIGHTINGS = 5
"""Of the non-negative least squares, towards Huber's loss."""
COARSE, TOLERANCE = 1e-8, 1e-15
"""Relative, of the polish of all places and of the best; with the first alone it would stop short of the optimum."""
NEGLIGIBLE = 1e-7
"""Part of the loss below which a term counts as zero."""


@dataclass(frozen=True, eq=False)
class SumOfPowers:
    """A fitted sum; its coefficients are those of x divided by `centres`, where the problem is well conditioned."""

    floor: float
    coefficients: np.ndarray
    """float64 (variables,), like the two below."""
    exponents: np.ndarray
    centres: np.ndarray
    """Geometric mean of each variable."""
    residuals: np.ndarray
    """log L − log of the law, (n,)."""
    jacobian: np.ndarray
    """Derivatives of the law's logarithm by floor, then coefficient and exponent of each variable, (n, parameters)."""
    objective: float
    """½·Σr², or the sum of Huber's loss of r."""
    converged: bool


def fit_sum_of_powers(variables: Sequence[np.ndarray], loss: np.ndarray, delta: float | None = None) -> SumOfPowers:
    """Least squares of the residuals of log L, or Huber's loss of them with threshold `delta`.

    On a grid of exponents the law is linear in E and the A: non-negative least squares of the relative residuals,
    reweighted for Huber's loss (Golub and Pereyra 1973, "variable projection"). From the best places of the grid all
    parameters are polished together on the residuals of log L.

    Args:
        variables: one or two arrays, float64 (n,), positive.
        loss: float64 (n,), positive.
        delta: Huber's threshold in log L (Hoffmann et al. 2022 take 1e-3); None for least squares.
    """
    centres = np.array([np.exp(np.log(values).mean()) for values in variables])
    logs = np.stack([np.log(values) for values in variables]) - np.log(centres)[:, None]
    low, high = EXPONENTS
    grid = np.geomspace(2 * low, high / 1.5, GRID[len(variables)])
    places = [_project(np.array(exponents), logs, loss, delta) for exponents in product(grid, repeat=len(variables))]
    places.sort(key=lambda place: place[0])
    results = [_polish(start, logs, loss, delta, COARSE) for _, start in places[: STARTS[len(variables)]]]
    best = min(results, key=lambda result: result.cost)
    best = _polish(best.x, logs, loss, delta, TOLERANCE)
    value, jacobian = _law(best.x, logs)
    floor, terms = best.x[0], best.x[1:].reshape(-1, 2)
    residuals = np.log(loss) - np.log(value)
    objective, converged = _objective(residuals, delta), best.status > 0
    return SumOfPowers(float(floor), terms[:, 0], terms[:, 1], centres, residuals, jacobian, objective, converged)


def _law(theta: np.ndarray, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The law's value (n,) and the derivatives of its logarithm (n, parameters)."""
    coefficients, exponents = theta[1::2, None], theta[2::2, None]
    powers = np.exp(-exponents * logs)
    value = theta[0] + np.sum(coefficients * powers, axis=0)
    gradient = np.empty((theta.size, value.size))
    gradient[0], gradient[1::2], gradient[2::2] = 1.0, powers, -coefficients * powers * logs
    return value, (gradient / value).T


def _objective(residuals: np.ndarray, delta: float | None) -> float:
    size = np.abs(residuals)
    if delta is None:
        return float(0.5 * np.sum(size**2))
    return float(np.sum(np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))))


def _project(
    exponents: np.ndarray, logs: np.ndarray, loss: np.ndarray, delta: float | None
) -> tuple[float, np.ndarray]:
    """The objective, and all parameters, with the best coefficients for these exponents."""
    columns = np.vstack([np.ones(loss.size), np.exp(-exponents[:, None] * logs)]).T / loss[:, None]
    weights = np.ones(loss.size)
    for _ in range(1 if delta is None else REWEIGHTINGS):
        coefficients, _ = nnls(columns * np.sqrt(weights)[:, None], np.sqrt(weights))
        relative = columns @ coefficients
        weights = 1.0 if delta is None else delta / np.maximum(np.abs(relative - 1), delta)
    theta = np.empty(1 + 2 * exponents.size)
    theta[0], theta[1::2], theta[2::2] = coefficients[0], coefficients[1:], exponents
    return _objective(np.log(relative), delta), theta


def _polish(start: np.ndarray, logs: np.ndarray, loss: np.ndarray, delta: float | None, tolerance: float):
    """The least-squares optimum nearest to `start`, with terms that vanish set to zero."""
    bottom, top = np.zeros(start.size), np.full(start.size, np.inf)
    bottom[2::2], top[2::2] = EXPONENTS
    robust = {} if delta is None else {"loss": "huber", "f_scale": delta}

    def polished(theta: np.ndarray, free: np.ndarray):
        def whole(part: np.ndarray) -> np.ndarray:
            full = theta.copy()
            full[free] = part
            return full

        result = least_squares(
            lambda part: np.log(_law(whole(part), logs)[0]) - np.log(loss),
            theta[free],
            lambda part: _law(whole(part), logs)[1][:, free],
            bounds=(bottom[free], top[free]),
            x_scale="jac",
            ftol=tolerance,
            xtol=tolerance,
            gtol=tolerance,
            max_nfev=1000,
            **robust,
        )
        result.x = whole(result.x)
        return result

    result = polished(start, np.ones(start.size, bool))
    linear = np.arange(start.size) % 2 == 1
    linear[0] = True
    vanished = linear & (result.x < NEGLIGIBLE * loss.min())
    if vanished.any():
        result = polished(np.where(vanished, 0.0, result.x), ~vanished)
    return result
