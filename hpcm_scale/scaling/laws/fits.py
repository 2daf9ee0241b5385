"""Fits of the laws: power law, saturating power law and L(N, D), and what the first two predict together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
from scipy import stats
from scipy.special import erf

from hpcm_scale.scaling.laws.law import (
    EXPONENTS,
    TERMS,
    CannotFit,
    Law,
    Points,
    Prediction,
    SumOfPowers,
    fit_sum_of_powers,
    inverse_root,
)

# Covariance of the parameters.


MOST_CONDITION = 1e7
"""Largest condition number of the scaled Jacobian; above it a parameter is not determined."""


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


def condition(fit: SumOfPowers) -> float:
    """Ratio of the largest to the smallest singular value of the Jacobian with columns of unit norm.

    Columns of parameters at their bound of zero are left out.
    """
    return inverse_root(fit.jacobian[:, np.any(fit.jacobian != 0, axis=0)])[1]


def covariance(fit: SumOfPowers, deviation: float, delta: float | None = None) -> np.ndarray | None:
    """Covariance of (E, A, α, …) of L = E + Σ A·x^−α, float64 (p, p); None if a parameter is not determined.

    σ²(JᵀJ)⁻¹ in centred coordinates, transformed to those of x. A parameter at its bound of zero counts as free, which
    widens the intervals.
    """
    root, number = inverse_root(fit.jacobian)
    if number > MOST_CONDITION or not np.all(np.any(fit.jacobian != 0, axis=0)):
        return None
    scale = np.eye(len(root))
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
        converged=True,
        r=float(line.rvalue),
        warnings=tuple(warnings),
    )


# Saturating power law: a power law with irreducible loss E.


FEWEST = 3
"""Least number of different x for an irreducible loss."""
ENOUGH = 6
"""Different x below which a law with irreducible loss has a warning."""


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
        warnings.append(f"{different} different {variable} hardly determine an irreducible loss: the interval is wide")
    fit = fit_sum_of_powers(list(points.variables.values()), points.loss)
    return _law(f"saturating_power_law_of_{points.of}", f"L = E + A·{variable}^−α", points, fit, warnings)


def _law(
    name: str, formula: str, points: Points, fit: SumOfPowers, warnings: list[str], delta: float | None = None
) -> Law:
    """The law of a fitted sum of powers, with covariance and warnings.

    `delta` is Huber's threshold of the fit.
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
SPAN = 3.0
"""Least ratio of the amounts of data of one size, at two sizes or more. In simulations of six sizes with noise of
0.3 %, N* was within 35 % from 3 on, and off by twofold at 2. With N and D on one diagonal but for one training, N* was
off by up to 70-fold; but for one at each of two sizes, its interval held in 97 %."""
WORST_CONDITION = 1000.0
"""Largest ratio of singular values of the scaled Jacobian. Grids with a span of 3 have about 600, with 10 about 140; N
and D on one diagonal have 60,000."""


def fit_parameters_and_data(points: Points, delta: float = HUBER) -> Law:
    """L = E + A·N^−α + B·D^−β with E, A, B ≥ 0, by Huber's loss of the residuals of log L (`fit_sum_of_powers`).

    Its intervals use the variance of Huber's estimate for normal residuals: π/2 of least squares for a threshold far
    below them. Simulated coverage at nominal 95 %, at three times the largest size and data of grids of 4 × 3 to 6 × 6
    with noise of 0.3 % and 1 %: 96–97 % if the form is right.

    Args:
        points: variables N (parameters) and D (pixels).
        delta: Huber's threshold; the objective is a sum over points.

    Raises:
        CannotFit: fewer than `FEWEST` sizes or amounts of data, fewer than five points, all losses are equal, or the
            effects of N and D cannot be told apart (`SPAN`, `WORST_CONDITION`).
    """
    sizes, amounts = points.different("N"), points.different("D")
    if min(sizes, amounts) < FEWEST or len(points) < PARAMETERS:
        raise CannotFit(
            f"L(N, D) needs {FEWEST} sizes, {FEWEST} amounts of training data and {PARAMETERS} trainings; "
            f"there are {sizes}, {amounts} and {len(points)}"
        )
    points.require_different_losses()
    logs = np.log(points.variables["D"])
    same = [np.abs(np.log(points.variables["N"] / size)) < 0.01 for size in points.variables["N"]]
    spans = sorted({tuple(of_size): float(np.ptp(logs[of_size])) for of_size in same}.values())
    if (span := math.exp(spans[-2])) < SPAN / 1.01:
        raise CannotFit(
            f"L(N, D) needs two sizes whose amounts of data differ by a factor of {SPAN:g}, and they differ by "
            f"{span:.2g}: train longer or shorter runs (hpcm cooldown)"
        )
    warnings = list(points.warnings)
    for number, what in ((sizes, "sizes"), (amounts, "amounts of training data")):
        if number < ENOUGH:
            warnings.append(f"{number} {what} hardly determine the irreducible loss E and the exponents")
    fit = fit_sum_of_powers([points.variables["N"], points.variables["D"]], points.loss, delta)
    if (worst := condition(fit)) > WORST_CONDITION:
        raise CannotFit(
            f"these sizes and amounts of data do not separate the effects of N and D (condition number {worst:.2g}, at "
            f"most {WORST_CONDITION:g}): train more amounts of data at each size"
        )
    return _law("law_of_parameters_and_data", "L = E + A·N^−α + B·D^−β", points, fit, warnings, delta)


# What a power law and a saturating power law of the same points say together.


def irreducible_probability(power_law: Law, saturating: Law) -> float | None:
    """p value of E = 0: the F test of the extra sum of squares of log L, at 1 and n − 3 degrees of freedom.

    Exact for linear models only; in simulations with 4 to 10 sizes it rejected true power laws in 2–5 % of the cases.
    A large p value does not show that E is 0. None without degrees of freedom.
    """
    noise, least = power_law.residual_deviation, saturating.residual_deviation
    if not saturating.degrees_of_freedom or noise is None or least is None:
        return None
    restricted, full = noise**2 * power_law.degrees_of_freedom, least**2 * saturating.degrees_of_freedom
    if full <= 0:
        return 0.0 if restricted > 0 else 1.0
    ratio = max(restricted - full, 0.0) / (full / saturating.degrees_of_freedom)
    return float(stats.f.sf(ratio, 1, saturating.degrees_of_freedom))


def bounded(power_law: Law, saturating: Law | None, evaluate: Callable[[Law], Prediction]) -> Prediction:
    """`evaluate` of the saturating law, whose lower bound is at least that of the power law.

    No law with E ≥ 0 falls faster than the one with E = 0, so that both lower bounds hold, and the greater one is used.
    Between the points the power law may be above the other; a lower bound above the prediction is not used.
    The interval needs no decision whether there is an irreducible loss: five or six sizes cannot tell. Simulated
    coverage at nominal 95 %, E = 0 included: benchmarks/results/scaling_coverage.md. With no saturating law, the
    prediction of the power law.

    Args:
        power_law: L = A·x^−α (`fit_power_law`).
        saturating: L = E + A·x^−α of the same points, or None.
        evaluate: a prediction that falls with x, such as `Law.predict` or `Law.ratio`, of any shape.
    """
    steepest = evaluate(power_law)
    if saturating is None:
        return steepest
    value, low, high = evaluate(saturating)
    low = np.where(steepest.low > value, low, np.maximum(low, steepest.low))
    return Prediction(value, low.item() if low.ndim == 0 else low, high)
