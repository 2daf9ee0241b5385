"""The cheapest way to a loss: how a compute budget is best split between parameters and data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from hpcm_scale.scaling.laws.law import CannotFit, Law

PFLOP = 1e15
ROUGH = 0.05
"""Standard deviation of log c from which on a power law of cost is warned of."""


class Optimum(NamedTuple):
    """The best split of a budget; floats, or float64 arrays like the budgets given."""

    parameters: float | np.ndarray
    pixels: float | np.ndarray


@dataclass(frozen=True)
class Cost:
    """Training cost per pixel, c(N) = k·N^κ FLOP, forward and backward."""

    k: float
    kappa: float
    covariance: tuple[tuple[float, float], tuple[float, float]]
    """Of (k, κ); zeros through two sizes, where none can be had."""
    residual_deviation: float | None
    """Of log c; None through two sizes."""

    @classmethod
    def exact(cls, k: float, kappa: float) -> Cost:
        """A cost that is known, such as 6·N FLOP per token: `Cost.exact(6, 1)`."""
        return cls(k, kappa, ((0.0, 0.0), (0.0, 0.0)), None)


def fit_cost(parameters: np.ndarray, flops_per_pixel: np.ndarray) -> Cost:
    """OLS of log c on log N over the observed sizes, instead of 6·N: this family's cost does not grow as N does.

    Args:
        parameters: float64 (n,), one of each size.
        flops_per_pixel: float64 (n,), measured training FLOP per pixel of that size.

    Raises:
        CannotFit: fewer than two different sizes.
    """
    if np.unique(parameters).size < 2:
        raise CannotFit("training cost against size needs two sizes at least")
    logs = np.log(parameters)
    line = stats.linregress(logs, np.log(flops_per_pixel))
    k = float(np.exp(line.intercept))
    if logs.size < 3:
        return Cost.exact(k, float(line.slope))
    across = -k * float(logs.mean()) * float(line.stderr) ** 2
    spread = ((float(k * line.intercept_stderr) ** 2, across), (across, float(line.stderr) ** 2))
    residuals = np.log(flops_per_pixel) - line.intercept - line.slope * logs
    return Cost(k, float(line.slope), spread, float(np.sqrt(np.sum(residuals**2) / (logs.size - 2))))


@dataclass(frozen=True)
class ComputeOptimal(Law):
    """L*(C): the lowest loss the joint law allows for C PFLOPs when a pixel costs k·N^κ FLOP.

    Minimising E + A·N^−α + B·D^−β under k·N^κ·D = 1e15·C gives, with M = 1e15·C/k,
    N* = (αA/(κβB))^(1/(α+κβ)) · M^(β/(α+κβ)), D* = M/N*^κ and L* = E + A·N*^−α + B·D*^−β; with k = 6 and κ = 1
    these are Hoffmann et al. 2022, equation 4. Intervals carry the joint law's errors and those of k and κ.
    """

    @property
    def variables(self) -> tuple[str, ...]:
        """`predict` takes PFLOPs."""
        return ("C",)

    @property
    def growth(self) -> tuple[float, float]:
        """Exponents a and b of N* ∝ C^a and D* ∝ C^b."""
        alpha, beta, kappa = (self.parameters[name] for name in ("alpha", "beta", "kappa"))
        return beta / (alpha + kappa * beta), alpha / (alpha + kappa * beta)

    def optimum(self, pflops: ArrayLike) -> Optimum:
        """Parameters N* and training pixels D* that reach the lowest loss for so many PFLOPs, any shape."""
        a, alpha, b, beta, k, kappa = (self.parameters[name] for name in ("A", "alpha", "B", "beta", "k", "kappa"))
        budget = PFLOP * np.asarray(pflops, np.float64) / k
        parameters = (alpha * a / (kappa * beta * b) * budget**beta) ** (1 / (alpha + kappa * beta))
        pixels = budget / parameters**kappa
        return Optimum(*(each.item() if each.ndim == 0 else each for each in (parameters, pixels)))

    def log_loss(self, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """log L* at `x` PFLOPs and its derivatives: at the optimum those of the joint law (envelope theorem)."""
        parameters, pixels = self.optimum(x)
        value, gradient = _joint_part(self).log_loss((parameters, pixels))
        b, beta, k = (self.parameters[name] for name in ("B", "beta", "k"))
        by_log_cost = beta * b * np.asarray(pixels) ** -beta / np.exp(value)
        return value, np.concatenate([gradient, [by_log_cost / k, by_log_cost * np.log(parameters)]])


def _joint_part(law: ComputeOptimal) -> Law:
    parameters = {name: value for name, value in law.parameters.items() if name not in ("k", "kappa")}
    observed = {name: law.observed[name] for name in ("N", "D")}
    return Law(**{**law.__dict__, "name": "joint", "parameters": parameters, "observed": observed})


def compute_optimal(joint: Law, cost: Cost, pflops: tuple[float, float]) -> ComputeOptimal:
    """The compute-optimal law of a joint law and the cost per pixel.

    Args:
        joint: what `fit_joint` gave.
        cost: training cost per pixel.
        pflops: least and most compute of the trainings behind it.

    Raises:
        CannotFit: the joint law does not fall with N or with D, has an exponent at the edge of its range, or the cost
            does not grow with N: no optimum.
    """
    if not (joint.parameters["A"] > 0 and joint.parameters["B"] > 0 and cost.kappa > 0):
        raise CannotFit("there is no best split: by the joint law, size or data costs or buys nothing")
    if joint.at_edge:
        raise CannotFit("an exponent of the joint law ended at the edge of its range, so it tells no best split")
    spread = None
    if joint.covariance is not None:
        spread = np.zeros((7, 7))
        spread[:5, :5], spread[5:, 5:] = joint.covariance, cost.covariance
    parameters = {**joint.parameters, "k": cost.k, "kappa": cost.kappa}
    warnings = joint.warnings
    if cost.residual_deviation is not None and cost.residual_deviation > ROUGH:
        warnings += (
            f"training cost per pixel departs from k·N^κ by {cost.residual_deviation:.0%} from size to size, "
            "and so does the best split",
        )
    values = {
        **joint.__dict__,
        "name": "compute_optimal",
        "formula": "L* = E + A·N*^−α + B·D*^−β, k·N*^κ·D* = 10¹⁵·C",
        "parameters": parameters,
        "covariance": None if spread is None else tuple(map(tuple, spread.tolist())),
        "standard_errors": None
        if spread is None
        else dict(zip(parameters, np.sqrt(np.diag(spread)).tolist(), strict=True)),
        "observed": {**joint.observed, "C": pflops},
        "warnings": warnings,
    }
    return ComputeOptimal(**values)
