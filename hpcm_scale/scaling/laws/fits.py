"""Fits of the laws: power law, saturating power law and L(N, D), and the comparison of the first two."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from scipy import stats
from scipy.special import erf

from hpcm_scale.scaling.laws.law import EXPONENTS, TERMS, CannotFit, Law, Points, SumOfPowers, fit_sum_of_powers

# AICc and the covariance of the parameters.


DETERMINED = 1e-7
"""Least ratio of smallest to largest singular value of the scaled Jacobian; below it a parameter is not determined."""


def aicc(residuals: np.ndarray, parameters: int) -> float | None:
    """Corrected Akaike information criterion for normal residuals of unknown variance; None unless n > K + 1.

    n·log(Σr²/n) + 2K + 2K(K + 1)/(n − K − 1) with K = `parameters` + 1, which counts the variance (Hurvich and Tsai
    1989; Burnham and Anderson 2002, section 7.4). Comparable only between laws of the same points. Residuals below
    rounding error count as rounding error.
    """
    n, count = residuals.size, parameters + 1
    if n <= count + 1:
        return None
    mean_square = max(float(np.mean(residuals**2)), float(np.finfo(np.float64).eps) ** 2)
    return n * math.log(mean_square) + 2 * count + 2 * count * (count + 1) / (n - count - 1)


def huber_inflation(delta: float | None, deviation: float) -> float:
    """Variance of a Huber estimate relative to least squares for normal residuals: E[ψ²]/E[ψ′]² (Huber 1964).

    1 for a threshold far above the residuals, π/2 for one far below.
    """
    if delta is None:
        return 1.0
    threshold = delta / max(deviation, 1e-12)
    if threshold < 1e-4:
        return math.pi / 2
    inside = float(erf(threshold / math.sqrt(2)))
    density = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi)
    clipped = inside - 2 * threshold * density + threshold**2 * (1 - inside)
    return clipped / inside**2


def covariance(fit: SumOfPowers, deviation: float, delta: float | None = None) -> np.ndarray | None:
    """Covariance of (E, A, α, …) of L = E + Σ A·x^−α, float64 (p, p); None if a parameter is not determined.

    σ²(JᵀJ)⁻¹ in centred coordinates, transformed to those of x. A parameter at its bound of zero counts as free, which
    widens the intervals.
    """
    norms = np.linalg.norm(fit.jacobian, axis=0)
    if np.any(norms == 0):
        return None
    _, singular, rows = np.linalg.svd(fit.jacobian / norms, full_matrices=False)
    if singular[-1] < DETERMINED * singular[0]:
        return None
    root = (rows.T / singular) / norms[:, None]
    scale = np.eye(norms.size)
    for index, (coefficient, exponent, centre) in enumerate(
        zip(fit.coefficients, fit.exponents, fit.centres, strict=True)
    ):
        at = 1 + 2 * index
        scale[at, at] = centre**exponent
        scale[at, at + 1] = coefficient * centre**exponent * math.log(centre)
    root = scale @ root
    return deviation**2 * huber_inflation(delta, deviation) * (root @ root.T)


# Power law: a straight line through log L against log x.


def fit_power_law(points: Points) -> Law:
    """L = A·x^−α by ordinary least squares of log L on log x (`scipy.stats.linregress`).

    Its prediction intervals are exact for independent normal residuals of log L if there is no irreducible loss.
    Otherwise the law overestimates the gain, however close Pearson's r is to −1.

    Args:
        points: of one variable, N or C.

    Raises:
        CannotFit: fewer than two different x, or all losses are equal.
    """
    ((variable, x),) = points.variables.items()
    if points.different(variable) < 2:
        raise CannotFit(
            f"a power law needs two different {variable}, and there is {min(len(points), 1)} among {points.data}"
        )
    points.require_different_losses()
    line = cast(Any, stats.linregress(np.log(x), np.log(points.loss)))
    amplitude, alpha = float(np.exp(line.intercept)), -float(line.slope)
    residuals = np.log(points.loss) - (line.intercept + line.slope * np.log(x))
    freedom = len(points) - 2
    warnings = list(points.warnings)
    if alpha <= 0:
        warnings.append(f"the loss does not fall with {variable}: the slope of log L is {-alpha:+.3g}")
    errors = deviation = spread = None
    if freedom:
        deviation = float(np.sqrt(np.sum(residuals**2) / freedom))
        across = float(np.log(x).mean()) * float(line.stderr) ** 2
        errors = {"A": amplitude * float(line.intercept_stderr), "alpha": float(line.stderr)}
        spread = (
            (errors["A"] * errors["A"], amplitude * across),
            (amplitude * across, errors["alpha"] * errors["alpha"]),
        )
    else:
        warnings.append("two points determine a power law exactly: it has no interval")
    return Law(
        name=f"power_law_of_{points.of}",
        formula=f"L = A·{variable}^−α",
        data=points.data,
        runs=points.runs,
        parameters={"A": amplitude, "alpha": alpha},
        standard_errors=errors,
        covariance=spread,
        residual_deviation=deviation,
        degrees_of_freedom=freedom,
        points=len(points),
        observed=points.observed(),
        aicc=aicc(residuals, 2),
        converged=True,
        r=float(line.rvalue),
        warnings=tuple(warnings),
    )


# Saturating power law: a power law with irreducible loss E.


FEWEST = 3
"""Least number of different x for an irreducible loss."""
ENOUGH = 6
"""Different x below which a law with irreducible loss has a warning: AICc needs as many points."""


def fit_saturating_power_law(points: Points) -> Law:
    """L = E + A·x^−α with E, A ≥ 0, by least squares of the residuals of log L (`fit_sum_of_powers`).

    Simulated coverage of its prediction intervals at nominal 95 %, at ten times the largest of 4 to 10 sizes with noise
    of 0.3 % and 2 %: 93–97 % if the form is right.

    Args:
        points: of one variable, N or C.

    Raises:
        CannotFit: fewer than `FEWEST` different x, or all losses are equal.
    """
    ((variable, _),) = points.variables.items()
    different = points.different(variable)
    if different < FEWEST:
        raise CannotFit(
            f"an irreducible loss needs {FEWEST} different {variable}, and there are {different} among {points.data}"
        )
    points.require_different_losses()
    warnings = list(points.warnings)
    if different < ENOUGH:
        warnings.append(
            f"{different} different {variable} hardly determine an irreducible loss: the interval is wide, and below "
            f"{ENOUGH} points AICc cannot distinguish it from zero"
        )
    fit = fit_sum_of_powers(list(points.variables.values()), points.loss)
    return _law(f"saturating_power_law_of_{points.of}", f"L = E + A·{variable}^−α", points, fit, warnings)


def _law(
    name: str, formula: str, points: Points, fit: SumOfPowers, warnings: list[str], delta: float | None = None
) -> Law:
    """The law of a fitted sum of powers, with covariance and warnings.

    `delta` is Huber's threshold of the fit; a robust fit has no AICc.
    """
    parameters = {"E": fit.irreducible}
    for index, (coefficient, exponent) in enumerate(TERMS[: len(fit.exponents)]):
        alpha = float(fit.exponents[index])
        parameters[coefficient] = float(fit.coefficients[index] * fit.centres[index] ** alpha)
        parameters[exponent] = alpha
    freedom = len(points) - len(parameters)
    deviation = spread = None
    warnings = [*warnings, *_at_zero(points, fit)]
    if freedom > 0:
        deviation = float(np.sqrt(np.sum(fit.residuals**2) / freedom))
        spread = covariance(fit, deviation, delta)
        if spread is None:
            warnings.append("the points do not determine every parameter: the law has no interval")
    else:
        warnings.append(f"{len(points)} points determine {len(parameters)} parameters exactly: no interval")
    if not fit.converged:
        warnings.append("the fit did not converge")
    errors = None if spread is None else dict(zip(parameters, np.sqrt(np.diag(spread)).tolist(), strict=True))
    law = Law(
        name=name,
        formula=formula,
        data=points.data,
        runs=points.runs,
        parameters=parameters,
        standard_errors=errors,
        covariance=None if spread is None else tuple(map(tuple, spread.tolist())),
        residual_deviation=deviation,
        degrees_of_freedom=max(freedom, 0),
        points=len(points),
        observed=points.observed(),
        aicc=None if delta else aicc(fit.residuals, len(parameters)),
        converged=fit.converged,
        r=None,
        warnings=(),
    )
    return replace(law, warnings=(*warnings, *_exponents(law)))


def _at_zero(points: Points, fit: SumOfPowers) -> list[str]:
    """Warnings on parameters at their bound of zero."""
    warnings = []
    if fit.irreducible == 0:
        warnings.append("the best irreducible loss is E = 0: these points show none, which does not prove that E is 0")
    warnings += [
        f"the loss does not fall with {variable}: its coefficient is 0"
        for variable, coefficient in zip(points.variables, fit.coefficients, strict=True)
        if coefficient == 0
    ]
    return warnings


def _exponents(law: Law) -> list[str]:
    """Warnings on exponents that the points do not determine."""
    if law.at_bound:
        low, high = EXPONENTS
        return [f"an exponent is at a bound of its range ({low:g} to {high:g}): do not use this law"]
    return [
        f"the points hardly determine {name}, {law.parameters[name]:.2g} ± {error:.2g}"
        for _, name in TERMS
        if (error := (law.standard_errors or {}).get(name, 0.0)) > law.parameters.get(name, 0.0) / 2
    ]


# L(N, D).


HUBER = 1e-3
"""Threshold of Huber's loss in log L (Hoffmann et al. 2022, arXiv 2203.15556, appendix D.3)."""
PARAMETERS = 5


def fit_parameters_and_data(points: Points, delta: float = HUBER) -> Law:
    """L = E + A·N^−α + B·D^−β with E, A, B ≥ 0, by Huber's loss of the residuals of log L (`fit_sum_of_powers`).

    Its intervals use the variance of Huber's estimate for normal residuals: π/2 of least squares for a threshold far
    below them. Simulated coverage at nominal 95 %, at three times the largest size and data of grids of 4 × 3 to 6 × 6
    with noise of 0.3 % and 1 %: 96–97 % if the form is right.

    Args:
        points: variables N (parameters) and D (pixels).
        delta: Huber's threshold; the objective is a sum over points.

    Raises:
        CannotFit: fewer than `FEWEST` sizes or amounts of data, fewer than five points, or all losses are equal.
    """
    sizes, amounts = points.different("N"), points.different("D")
    if min(sizes, amounts) < FEWEST or len(points) < PARAMETERS:
        raise CannotFit(
            f"L(N, D) needs {FEWEST} sizes, {FEWEST} amounts of training data and {PARAMETERS} trainings; "
            f"there are {sizes}, {amounts} and {len(points)}"
        )
    points.require_different_losses()
    warnings = list(points.warnings)
    for number, what in ((sizes, "sizes"), (amounts, "amounts of training data")):
        if number < ENOUGH:
            warnings.append(f"{number} {what} hardly determine the irreducible loss E and the exponents")
    fit = fit_sum_of_powers([points.variables["N"], points.variables["D"]], points.loss, delta)
    return _law("law_of_parameters_and_data", "L = E + A·N^−α + B·D^−β", points, fit, warnings, delta)


# Which of two laws of the same points is preferred: the power law or the saturating one.


REJECTED = 0.05
"""Probability below which an F test rejects the power law."""


@dataclass(frozen=True)
class Comparison:
    """A power law and a saturating power law of the same points."""

    preferred: str
    """Name of the law with the lower AICc; that of the F test where AICc is undefined or `criteria_disagree`."""
    reason: str
    aicc_difference: float | None
    """AICc of the saturating law minus that of the power law; None if either is None."""
    f_probability: float | None
    """Probability of an equal or larger improvement if E = 0; None without degrees of freedom."""
    criteria_disagree: bool
    """AICc prefers the power law but the F test rejects it, and decides: with six trainings the AICc penalty of E is
    30. In simulations it missed nine of ten irreducible losses, and the F test none."""


def compare(power_law: Law, saturating: Law | None) -> Comparison:
    """Compare two laws of the same points by AICc and by an F test, since AICc is undefined or weak for few points.

    The F test (extra sum of squares) compares Σr² of log L at 1 and n − 3 degrees of freedom. It is exact for linear
    models only; in simulations with 4 to 10 sizes it rejected true power laws in 2–5 % of the cases.
    """
    if saturating is None:
        return Comparison(power_law.name, "only the power law could be fitted", None, None, False)
    probability = _f_probability(power_law, saturating)
    rejected = probability is not None and probability < REJECTED
    by_f = f"an F test {'rejects' if rejected else 'does not reject'} E = 0"
    by_f = "" if probability is None else f"{by_f} (p = {probability:.2g})"
    if power_law.aicc is None or saturating.aicc is None:
        best = saturating if rejected else power_law
        reason = f"AICc needs six trainings to judge an irreducible loss, and there are {power_law.points}"
        by_f = by_f or "no other criterion is defined, so the power law is the default"
        return Comparison(best.name, f"{reason}; {by_f}", None, probability, False)
    difference = saturating.aicc - power_law.aicc
    best = saturating if difference < 0 or rejected else power_law
    disagree = difference >= 0 and rejected
    kind = "saturating power law" if difference < 0 else "power law without irreducible loss"
    reason = f"AICc is lower by {abs(difference):.1f} for the {kind}"
    reason += f", but with {power_law.points} trainings it can miss one, and {by_f}" if disagree else f", and {by_f}"
    return Comparison(best.name, reason, difference, probability, disagree)


def _f_probability(power_law: Law, saturating: Law) -> float | None:
    noise, least = power_law.residual_deviation, saturating.residual_deviation
    if not saturating.degrees_of_freedom or noise is None or least is None:
        return None
    restricted, full = noise**2 * power_law.degrees_of_freedom, least**2 * saturating.degrees_of_freedom
    if full <= 0:
        return 0.0 if restricted > 0 else 1.0
    ratio = max(restricted - full, 0.0) / (full / saturating.degrees_of_freedom)
    return float(stats.f.sf(ratio, 1, saturating.degrees_of_freedom))
