"""The papers' law: a straight line through log L against log x."""

from __future__ import annotations

import numpy as np
from scipy import stats

from hpcm_scale.scaling.laws.law import Law
from hpcm_scale.scaling.laws.points import CannotFit, Points
from hpcm_scale.scaling.laws.uncertainty import aicc


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
