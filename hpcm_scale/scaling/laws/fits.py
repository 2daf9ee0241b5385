"""Fits of the laws: power law, power law with a floor, L(N, D), and how they compare."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats
from scipy.special import erf

from hpcm_scale.scaling.laws.law import EXPONENTS, TERMS, CannotFit, Law, Points, SumOfPowers, fit_sum_of_powers

# How sure a fit is: AICc, and the covariance of its parameters.


DETERMINED = 1e-7
"""Ratio of smallest to largest singular value of the scaled Jacobian under which a parameter is not determined."""


def aicc(residuals: np.ndarray, parameters: int) -> float | None:
    """Akaike's information criterion for few points, of normal residuals with unknown variance.

    n·log(Σr²/n) + 2K + 2K(K + 1)/(n − K − 1) with K = `parameters` + 1, the variance being estimated, too
    (Hurvich and Tsai 1989; Burnham and Anderson 2002, section 7.4). None unless n > K + 1. Comparable between
    laws of the same points only. Residuals of log L below rounding count as rounding.
    """
    n, count = residuals.size, parameters + 1
    if n <= count + 1:
        return None
    mean_square = max(float(np.mean(residuals**2)), float(np.finfo(np.float64).eps) ** 2)
    return n * math.log(mean_square) + 2 * count + 2 * count * (count + 1) / (n - count - 1)


def huber_inflation(delta: float | None, deviation: float) -> float:
    """Variance of a Huber estimate over that of least squares, for normal residuals of this deviation.

    E[ψ²]/E[ψ′]² (Huber 1964): 1 for a threshold far above the residuals, π/2 for one far below.
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
    """Covariance of (E, A, α, …) of L = E + Σ A·x^−α, x as it is: (p, p) float64.

    σ²(JᵀJ)⁻¹ in centred coordinates, taken to x itself. A parameter at its bound of zero counts as free, which widens
    the intervals. None where the points do not determine every parameter.
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


# The papers' law: a straight line through log L against log x.


def fit_power_law(points: Points) -> Law:
    """L = A·x^−α by ordinary least squares of log L on log x: `scipy.stats.linregress` itself.

    Its prediction intervals are exact for independent normal residuals of log L: 95 % hold 95 % of the time. They know
    nothing of a floor: where there is one, the law promises too much, however close to −1 its Pearson r.

    Args:
        points: of one variable, N or C.

    Raises:
        CannotFit: fewer than two different x, or losses that are all equal.
    """
    ((variable, x),) = points.variables.items()
    if points.different(variable) < 2:
        there = f"there is {min(len(points), 1)}{points.origin}"
        raise CannotFit(f"a power law needs two different {variable}, and {there}")
    points.require_different_losses()
    line = stats.linregress(np.log(x), np.log(points.loss))
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


# A power law above a floor, and what the floors of all laws share.


FEWEST = 3
"""Different sizes (or budgets) without which a floor is refused."""
ENOUGH = 6
"""Different sizes under which a floor is warned of: AICc against a power law needs as many points."""


def fit_floor(points: Points) -> Law:
    """L = E + A·x^−α with E, A ≥ 0, by least squares of the residuals of log L (`fit_sum_of_powers`).

    Its prediction intervals at nominal 95 %, simulated at ten times the largest of 4 to 10 sizes with noise of
    0.3 % and 2 %, held 93–97 % of the time where the form was right; nothing guards against a wrong form.

    Args:
        points: of one variable, N or C.

    Raises:
        CannotFit: fewer than `FEWEST` different x, or losses that are all equal.
    """
    ((variable, _),) = points.variables.items()
    different = points.different(variable)
    if different < FEWEST:
        there = f"there are {different}{points.origin}"
        raise CannotFit(f"a floor needs {FEWEST} different {variable} at least, and {there}")
    points.require_different_losses()
    warnings = list(points.warnings)
    if different < ENOUGH:
        warnings.append(
            f"{different} different {variable} say little about a floor: the interval is wide, "
            f"and under {ENOUGH} points AICc cannot tell it from a power law"
        )
    fit = fit_sum_of_powers(list(points.variables.values()), points.loss)
    return law_with_floor(f"floor_of_{points.of}", f"L = E + A·{variable}^−α", points, fit, warnings)


def law_with_floor(
    name: str, formula: str, points: Points, fit: SumOfPowers, warnings: list[str], delta: float | None = None
) -> Law:
    """A law from the fit of a sum of powers, with its covariance and what there is to warn of.

    `delta` is Huber's threshold of the fit; a robust fit has no AICc.
    """
    parameters = {"E": fit.floor}
    for index, (coefficient, exponent) in enumerate(TERMS[: len(fit.exponents)]):
        alpha = float(fit.exponents[index])
        parameters[coefficient] = float(fit.coefficients[index] * fit.centres[index] ** alpha)
        parameters[exponent] = alpha
    freedom = len(points) - len(parameters)
    deviation = spread = None
    warnings = [*warnings, *_boundaries(points, fit)]
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


def _exponents(law: Law) -> list[str]:
    """Sentences on exponents that these points do not tell."""
    if law.at_edge:
        low, high = EXPONENTS
        return [f"an exponent ended at the edge of its range ({low:g} to {high:g}): do not use this law"]
    return [
        f"the points hardly determine {name}, {law.parameters[name]:.2g} ± {error:.2g}"
        for _, name in TERMS
        if (error := (law.standard_errors or {}).get(name, 0.0)) > law.parameters.get(name, 0.0) / 2
    ]


def _boundaries(points: Points, fit: SumOfPowers) -> list[str]:
    """Sentences on parameters that ended at a bound."""
    told = []
    if fit.floor == 0:
        told.append("the best floor is E = 0: these points show none, which does not mean that there is none")
    told += [
        f"the loss does not fall with {variable}: its coefficient is 0"
        for variable, coefficient in zip(points.variables, fit.coefficients, strict=True)
        if coefficient == 0
    ]
    return told


# The joint law of parameters and data.


HUBER = 1e-3
"""Threshold of Huber's loss in log L, as Hoffmann et al. 2022 (arXiv 2203.15556, appendix D.3) have it."""
PARAMETERS = 5


def fit_joint(points: Points, delta: float = HUBER) -> Law:
    """L = E + A·N^−α + B·D^−β with E, A, B ≥ 0, by Huber's loss of the residuals of log L (`fit_sum_of_powers`).

    Its intervals take the variance that Huber's estimate has for normal residuals, π/2 of least squares' for a
    threshold far below them. At nominal 95 %, simulated at three times the largest size and data of grids of 4 × 3 to
    6 × 6 with noise of 0.3 % and 1 %, they held 96–97 % of the time where the form was right.

    Args:
        points: variables N (parameters) and D (pixels).
        delta: Huber's threshold; the objective is summed over the points.

    Raises:
        CannotFit: fewer than `FEWEST` sizes or amounts of data, fewer than five points, or losses that are all
            equal.
    """
    sizes, amounts = points.different("N"), points.different("D")
    if min(sizes, amounts) < FEWEST or len(points) < PARAMETERS:
        raise CannotFit(
            f"the joint law needs {FEWEST} sizes, {FEWEST} amounts of training data and {PARAMETERS} trainings; "
            f"there are {sizes}, {amounts} and {len(points)}"
        )
    points.require_different_losses()
    warnings = list(points.warnings)
    for count, what in ((sizes, "sizes"), (amounts, "amounts of training data")):
        if count < ENOUGH:
            warnings.append(f"{count} {what} say little about the floor E and the exponents beside it")
    fit = fit_sum_of_powers([points.variables["N"], points.variables["D"]], points.loss, delta)
    return law_with_floor("joint", "L = E + A·N^−α + B·D^−β", points, fit, warnings, delta)


# Which of two laws of the same trainings the data prefer: the power law alone, or with a floor.


REJECTED = 0.05
"""Probability under which an F test rejects the power law."""


@dataclass(frozen=True)
class Comparison:
    """A power law and the same with a floor, through the same points."""

    preferred: str
    """Name of the law with the lower AICc; but where few points leave the floor none, or too little (`contested`), of
    the law that `f_probability` favours."""
    reason: str
    """A sentence."""
    aicc_difference: float | None
    """AICc of the law with a floor less that of the power law; None where either has none."""
    f_probability: float | None
    """Probability of so much better a fit by the floor if there were none; None without degrees of freedom."""
    contested: bool
    """AICc prefers the power law, but the F test rejects it, and decides: on six trainings AICc charges 30 for a floor,
    and overlooked nine in ten floors, simulated, that the F test saw in all."""


def compare(power_law: Law, floor: Law | None) -> Comparison:
    """Compare by AICc, with an F test beside it, since AICc says nothing, or little, of a floor on few trainings.

    The F test (extra sum of squares) weighs Σr² of log L of both laws at 1 and n − 3 degrees of freedom. It is exact
    for linear laws only; simulated on 4 to 10 sizes, it rejected power laws that were true 2–5 % of the time.
    """
    if floor is None:
        return Comparison(power_law.name, "only the power law could be fitted", None, None, False)
    probability = _f_probability(power_law, floor)
    rejected = probability is not None and probability < REJECTED
    by_f = f"an F test {'rejects' if rejected else 'does not reject'} the power law without a floor"
    by_f = "" if probability is None else f"{by_f} (p = {probability:.2g})"
    if power_law.aicc is None or floor.aicc is None:
        best = floor if rejected else power_law
        reason = f"AICc needs six trainings to weigh a floor and there are {power_law.points}"
        by_f = by_f or "nothing else can tell, and the power law stands for want of better"
        return Comparison(best.name, f"{reason}; {by_f}", None, probability, False)
    difference = floor.aicc - power_law.aicc
    best = floor if difference < 0 or rejected else power_law
    contested = difference >= 0 and rejected
    kind = "with" if difference < 0 else "without"
    reason = f"AICc is lower by {abs(difference):.1f} for the power law {kind} a floor"
    reason += f", but on {power_law.points} trainings it can overlook one, and {by_f}" if contested else f", and {by_f}"
    return Comparison(best.name, reason, difference, probability, contested)


def _f_probability(power_law: Law, floor: Law) -> float | None:
    if not floor.degrees_of_freedom or floor.residual_deviation is None or power_law.residual_deviation is None:
        return None
    alone, beside = (law.residual_deviation**2 * law.degrees_of_freedom for law in (power_law, floor))
    if beside <= 0:
        return 0.0 if alone > 0 else 1.0
    ratio = max(alone - beside, 0.0) / (beside / floor.degrees_of_freedom)
    return float(stats.f.sf(ratio, 1, floor.degrees_of_freedom))
