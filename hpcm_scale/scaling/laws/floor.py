"""A power law above a floor, and what the floors of all laws share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hpcm_scale.scaling.laws.law import TERMS, Law
from hpcm_scale.scaling.laws.points import CannotFit, Points
from hpcm_scale.scaling.laws.sum_of_powers import EXPONENTS, SumOfPowers, fit_sum_of_powers
from hpcm_scale.scaling.laws.uncertainty import aicc, covariance

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
