"""One law for two training recipes: shared exponents, and efficiencies of the second recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import stats
from scipy.optimize import least_squares, nnls

from hpcm_scale.scaling.laws.fits import SPAN, WORST_CONDITION
from hpcm_scale.scaling.laws.law import EXPONENTS, CannotFit, Prediction, derivatives, inverse_root

SAME = 0.01
"""Difference in the logarithm below which two values of a variable count as equal."""
MOST = 1e3
"""Largest efficiency, and its inverse the smallest, that is fitted."""
FEWEST = 3
"""Least number of different values of the first variable for an irreducible loss."""


@dataclass(frozen=True, eq=False)
class SharedLaw:
    """L = E + A·(ρ_N·N)^−α + B·(ρ_D·D)^−β, where both ρ are 1 for the first recipe; or only one of the two terms."""

    parameters: dict[str, float]
    """E, and for each variable X its term at the geometric mean, "X", the exponent "exponent_X", "log_rho_X", and
    "difference_X", the exponent of the second recipe minus that of the first: 0 in the shared law."""
    covariance: np.ndarray
    """Of `parameters`, float64 (p, p); zeros for what is not fitted."""
    condition: float
    """Ratio of the largest to the smallest singular value of the Jacobian with columns of unit norm."""
    squares: float
    """Σr² of log L."""
    degrees_of_freedom: int

    def interval(self, log_quantity: Callable[[Mapping[str, float]], float]) -> Prediction:
        """exp of a function of `parameters`, with a 95 % confidence interval: delta method on the function."""
        gradient = derivatives(log_quantity, self.parameters)
        error = np.sqrt(gradient @ self.covariance @ gradient)
        half = stats.t.ppf(0.975, self.degrees_of_freedom) * error
        value = log_quantity(self.parameters)
        return Prediction(*(float(np.exp(min(each, 700.0))) for each in (value, value - half, value + half)))


def fit_shared(
    variables: Mapping[str, np.ndarray], second: np.ndarray, loss: np.ndarray
) -> tuple[SharedLaw, SharedLaw | None]:
    """The law with shared exponents, and the one with separate exponents or None if the points do not determine it.

    Least squares of the residuals of log L (Volkova et al. 2026, arXiv 2602.07712, have the same law). E is 0 with two
    values of the first variable. In a law of one variable, E includes the other term, which must not differ between the
    recipes.

    Args:
        variables: "N", "D" or both, in this order: parameters and pixels, float64 (n,).
        second: bool (n,), whether a point is of the second recipe.
        loss: float64 (n,).

    Raises:
        CannotFit: a variable has one value in one of the recipes, both have two values, there are no degrees of
            freedom, or the points do not separate the effects (`SPAN`, `WORST_CONDITION`).
    """
    fewest = {name: min(different(values[second == which]) for which in (0, 1)) for name, values in variables.items()}
    most = {name: max(different(values[second == which]) for which in (0, 1)) for name, values in variables.items()}
    if min(fewest.values()) < 2 or (len(variables) == 2 and max(most.values()) < FEWEST):
        raise CannotFit(f"each recipe needs two values of {' and '.join(variables)}, and one needs three of either")
    for which in (False, True) if len(variables) == 2 else ():
        size, pixels = (np.log(values[second == which]) for values in variables.values())
        if max(np.ptp(pixels[np.abs(size - each) < SAME]) for each in size) < np.log(SPAN) - SAME:
            raise CannotFit(f"the amounts of data of one size differ by less than a factor of {SPAN:g} in one recipe")
    recipe, irreducible = second.astype(np.float64), next(iter(most.values())) >= FEWEST
    logs = np.stack([np.log(values) - np.log(values).mean() for values in variables.values()])
    free = np.array([irreducible, *[True, True, True, False] * len(logs)])
    if loss.size <= free.sum():
        raise CannotFit(f"{loss.size} trainings determine {free.sum()} parameters without an error: train more")
    shared = _fit(tuple(variables), logs, recipe, loss, free, _starts(logs, recipe, loss, irreducible))
    low, high = EXPONENTS
    for name in variables:
        term, exponent = shared.parameters[name], shared.parameters[f"exponent_{name}"]
        if term < 1e-6 * loss.min() or not 1.01 * low <= exponent <= high / 1.01:
            raise CannotFit(f"the losses follow no power law of {name}")
        if abs(shared.parameters[f"log_rho_{name}"]) > 0.99 * np.log(MOST):
            raise CannotFit(
                f"the efficiency in {name} is beyond a factor of {MOST:g}, which these trainings do not tell"
            )
    if shared.condition > WORST_CONDITION:
        raise CannotFit(f"the trainings do not separate the terms of the law (condition number {shared.condition:.2g})")
    separate = np.where(np.arange(free.size) % 4 == 0, True, free)
    separate[0] = irreducible
    if not irreducible or loss.size <= separate.sum():
        return shared, None
    return shared, _fit(tuple(variables), logs, recipe, loss, separate, [np.array(list(shared.parameters.values()))])


def different(values: np.ndarray) -> int:
    """Number of different values, float64 (n,), within `SAME`."""
    return int(np.sum(np.diff(np.sort(np.log(values)), prepend=-np.inf) > SAME))


def p_equal_exponents(shared: SharedLaw, separate: SharedLaw) -> float:
    """p value of equal exponents: F test of the extra sum of squares of log L.

    Exact for linear models only; simulated rejections of equal exponents: benchmarks/results/scaling_recipes.md.
    """
    extra, noise = shared.squares - separate.squares, separate.squares / separate.degrees_of_freedom
    freedom = shared.degrees_of_freedom - separate.degrees_of_freedom
    ratio = max(extra, 0.0) / freedom / max(noise, 1e-300)
    return float(stats.f.sf(ratio, freedom, separate.degrees_of_freedom))


def _law(theta: np.ndarray, logs: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L (n,) and the derivatives of log L by theta, the values of `SharedLaw.parameters`, (n, p)."""
    loss, columns = np.full(second.size, theta[0]), [np.ones(second.size)]
    for log, (size, exponent, rho, difference) in zip(logs, theta[1:].reshape(-1, 4), strict=True):
        steepness, shifted = exponent + second * difference, log + second * rho
        power = np.exp(-steepness * shifted)
        loss = loss + size * power
        columns += [power, *(-size * power * each for each in (shifted, steepness * second, shifted * second))]
    return loss, np.stack(columns, axis=1) / loss[:, None]


def _starts(logs: np.ndarray, second: np.ndarray, loss: np.ndarray, irreducible: bool) -> list[np.ndarray]:
    """The three best theta of a grid of exponents and of ρ of the last variable; E and terms by least squares."""
    found = []
    ones = np.ones(loss.size)
    for *exponents, rho in product(*[np.geomspace(0.05, 1.5, 6)] * len(logs), (-3.0, -1.5, 0.0, 1.5, 3.0)):
        shifts = [0.0] * (len(logs) - 1) + [rho]
        powers = [np.exp(-a * (log + second * by)) for a, log, by in zip(exponents, logs, shifts, strict=True)]
        sizes, error = nnls(np.stack([irreducible * ones, *powers], axis=1) / loss[:, None], ones)
        terms = np.stack([sizes[1:], exponents, shifts, np.zeros(len(logs))], axis=1)
        found.append((error, np.append(sizes[0], terms)))
    return [theta for _, theta in sorted(found, key=lambda each: each[0])[:3]]


def _fit(
    names: Sequence[str], logs: np.ndarray, second: np.ndarray, loss: np.ndarray, free: np.ndarray, starts: list
) -> SharedLaw:
    """Least squares from the best of `starts`; what is not `free` keeps its value."""
    bottom, top = np.full(free.size, -np.inf), np.full(free.size, np.inf)
    bottom[0] = bottom[1::4] = 0.0
    bottom[2::4], top[2::4] = EXPONENTS
    bottom[3::4], top[3::4] = -np.log(MOST), np.log(MOST)

    def whole(part: np.ndarray) -> np.ndarray:
        full = starts[0].copy()  # E and differences that are not free are 0 in each start
        full[free] = part
        return full

    results = [
        least_squares(
            lambda part: np.log(np.maximum(_law(whole(part), logs, second)[0], 1e-300) / loss),
            np.clip(start, bottom + 1e-9, top - 1e-9)[free],
            lambda part: _law(whole(part), logs, second)[1][:, free],  # pyright: ignore[reportArgumentType]
            bounds=(bottom[free], top[free]),
            x_scale="jac",
            ftol=1e-12,
            xtol=1e-12,
            gtol=1e-12,
            max_nfev=500,
        )
        for start in starts
    ]
    best = min(results, key=lambda result: result.cost)
    squares, freedom = 2 * float(best.cost), int(loss.size - free.sum())
    jacobian = _law(whole(best.x), logs, second)[1][:, free]
    root, number = inverse_root(jacobian)
    covariance = np.zeros((free.size, free.size))
    covariance[np.ix_(free, free)] = squares / freedom * (root @ root.T)
    keys = ["E"] + [key.format(name) for name in names for key in ("{}", "exponent_{}", "log_rho_{}", "difference_{}")]
    parameters = dict(zip(keys, whole(best.x).tolist(), strict=True))
    return SharedLaw(parameters, covariance, number, squares, freedom)
