"""The compute-optimal law: the best split of a compute budget between parameters and data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from hpcm_scale.scaling.laws.law import CannotFit, Law, Prediction, derivatives

PFLOP = 1e15
ROUGH = 0.05
"""Residual standard deviation of log c above which the power law of cost has a warning."""


class Optimum(NamedTuple):
    """Compute-optimal parameters N* and pixels D*; floats, or float64 arrays of the shape of the budgets."""

    parameters: Any
    pixels: Any


@dataclass(frozen=True)
class Cost:
    """Training cost per pixel, c(N) = k·N^κ FLOP, forward and backward."""

    k: float
    kappa: float
    covariance: tuple[tuple[float, float], tuple[float, float]]
    """Covariance of (k, κ); zeros with two sizes, which do not determine it."""
    residual_deviation: float | None
    """Residual standard deviation of log c; None with two sizes."""

    @classmethod
    def exact(cls, k: float, kappa: float) -> Cost:
        """A known cost, such as 6·N FLOP per token: `Cost.exact(6, 1)`."""
        return cls(k, kappa, ((0.0, 0.0), (0.0, 0.0)), None)


def fit_cost(parameters: np.ndarray, flops_per_pixel: np.ndarray) -> Cost:
    """OLS of log c on log N over the observed sizes; the cost of this family is not proportional to N.

    Args:
        parameters: float64 (n,), one of each size.
        flops_per_pixel: float64 (n,), training FLOP per pixel of each size.

    Raises:
        CannotFit: fewer than two different sizes.
    """
    if np.unique(parameters).size < 2:
        raise CannotFit("training cost against size needs two sizes")
    logs = np.log(parameters)
    line = cast(Any, stats.linregress(logs, np.log(flops_per_pixel)))
    k = float(np.exp(line.intercept))
    if logs.size < 3:
        return Cost.exact(k, float(line.slope))
    across = -k * float(logs.mean()) * float(line.stderr) ** 2
    spread = ((float(k * line.intercept_stderr) ** 2, across), (across, float(line.stderr) ** 2))
    residuals = np.log(flops_per_pixel) - line.intercept - line.slope * logs
    return Cost(k, float(line.slope), spread, float(np.sqrt(np.sum(residuals**2) / (logs.size - 2))))


@dataclass(frozen=True)
class ComputeOptimal(Law):
    """L*(C): the minimum of L(N, D) at C PFLOPs when a training pixel costs k·N^κ FLOP.

    The minimum of E + A·N^−α + B·D^−β with k·N^κ·D = 1e15·C is, with M = 1e15·C/k, at
    N* = (αA/(κβB))^(1/(α+κβ)) · M^(β/(α+κβ)) and D* = M/N*^κ; for k = 6 and κ = 1 this is equation 4 of Hoffmann et
    al. 2022 (arXiv 2203.15556). Intervals include the errors of L(N, D), k and κ.
    """

    @property
    def variables(self) -> tuple[str, ...]:
        """Arguments of `predict`: PFLOPs."""
        return ("C",)

    @property
    def growth(self) -> tuple[float, float]:
        """Exponents (a, b) of N* ∝ C^a and D* ∝ C^b."""
        return _growth(self.parameters)

    def optimum(self, pflops: ArrayLike) -> Optimum:
        """N* and D* at `pflops`, any shape."""
        values = _optimum(self.parameters, np.log(np.asarray(pflops, np.float64)))
        return Optimum(*(value.item() if value.ndim == 0 else value for value in map(np.exp, values)))

    def optimum_intervals(self, pflops: float, level: float = 0.95) -> tuple[Prediction, Prediction]:
        """N* and D* at `pflops` with confidence intervals, by the delta method on their logarithms.

        Simulated coverage: benchmarks/results/scaling_coverage.md.
        """
        found = self._delta(lambda parameters: np.stack(_optimum(parameters, np.log(pflops))), level)
        size, data = (Prediction(*map(float, np.exp(each))) for each in found)
        return size, data

    def growth_intervals(self, level: float = 0.95) -> tuple[Prediction, Prediction]:
        """The exponents `growth` with confidence intervals."""
        a, b = (Prediction(*map(float, each)) for each in self._delta(lambda each: np.array(_growth(each)), level))
        return a, b

    def compute_for(self, loss: float, level: float = 0.95) -> Prediction:
        """PFLOPs at which L* is `loss`, with a confidence interval; (inf, inf, inf) if `loss` is not above E.

        The interval is unbounded above if the law is not sure that any compute reaches the loss: E plus its half width
        is not below `loss`.
        """
        excess = loss - self.parameters["E"]
        if excess <= 0:
            return Prediction(math.inf, math.inf, math.inf)
        alpha, beta, kappa = (self.parameters[name] for name in ("alpha", "beta", "kappa"))
        # L* − E is a power law of C.
        slope = -alpha * beta / (alpha + kappa * beta)
        log_compute = float((np.log(excess) - np.log(self.predict(1.0).value - self.parameters["E"])) / slope)
        _, gradient = self.log_loss(np.exp(log_compute))
        by_log_compute = slope * excess / loss
        half = self._quantile(level) * math.sqrt(self._variance(gradient[:, None])[0]) / abs(by_log_compute)
        error = (self.standard_errors or {}).get("E", math.nan)
        sure = self.parameters["E"] + self._quantile(level) * error < loss
        return Prediction(
            math.exp(log_compute),
            math.exp(log_compute - half),
            _exp(log_compute + half) if sure else math.inf,
        )

    def _delta(self, function: Callable[[dict[str, float]], np.ndarray], level: float) -> np.ndarray:
        """Value, lower and upper bound of each of m quantities, (m, 3), by the delta method."""
        value = function(self.parameters)
        half = self._quantile(level) * np.sqrt(self._variance(derivatives(function, self.parameters)))
        return np.stack([value, value - half, value + half], axis=1)

    def log_loss(self, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """log L* at `x` PFLOPs and its derivatives: at the optimum those of L(N, D) (envelope theorem)."""
        parameters, pixels = self.optimum(x)
        value, gradient = _parameters_and_data(self).log_loss((parameters, pixels))
        b, beta, k = (self.parameters[name] for name in ("B", "beta", "k"))
        by_log_cost = beta * b * np.asarray(pixels) ** -beta / np.exp(value)
        return value, np.concatenate([gradient, [by_log_cost / k, by_log_cost * np.log(parameters)]])


def _growth(parameters: dict[str, float]) -> tuple[float, float]:
    alpha, beta, kappa = (parameters[name] for name in ("alpha", "beta", "kappa"))
    return beta / (alpha + kappa * beta), alpha / (alpha + kappa * beta)


def _optimum(parameters: dict[str, float], log_pflops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log N* and log D*."""
    a, alpha, b, beta, k, kappa = (parameters[name] for name in ("A", "alpha", "B", "beta", "k", "kappa"))
    budget = np.log(PFLOP / k) + log_pflops
    size = (np.log(alpha * a / (kappa * beta * b)) + beta * budget) / (alpha + kappa * beta)
    return size, budget - kappa * size


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _parameters_and_data(law: ComputeOptimal) -> Law:
    """The L(N, D) it follows from."""
    parameters = {name: value for name, value in law.parameters.items() if name not in ("k", "kappa")}
    observed = {name: law.observed[name] for name in ("N", "D")}
    return Law(**{**law.__dict__, "parameters": parameters, "observed": observed})


def compute_optimal(law: Law, cost: Cost, pflops: tuple[float, float]) -> ComputeOptimal:
    """The compute-optimal law that follows from L(N, D) and the cost per pixel.

    Args:
        law: L(N, D) (`fits.fit_parameters_and_data`).
        cost: training cost per pixel.
        pflops: least and most compute of the trainings.

    Raises:
        CannotFit: there is no optimum: L(N, D) does not fall with N or D, has an exponent at a bound, or the cost does
            not grow with N.
    """
    if not (law.parameters["A"] > 0 and law.parameters["B"] > 0 and cost.kappa > 0):
        raise CannotFit("there is no compute-optimal split: by L(N, D), size or data has no cost or no effect")
    if law.at_bound:
        raise CannotFit("an exponent of L(N, D) is at a bound of its range, so there is no compute-optimal split")
    spread = None
    if law.covariance is not None:
        spread = np.zeros((7, 7))
        spread[:5, :5], spread[5:, 5:] = law.covariance, cost.covariance
    parameters = {**law.parameters, "k": cost.k, "kappa": cost.kappa}
    warnings = law.warnings
    if cost.residual_deviation is not None and cost.residual_deviation > ROUGH:
        warnings += (
            f"training cost per pixel deviates from k·N^κ by {cost.residual_deviation:.0%} (standard deviation over "
            "sizes), and the compute-optimal split likewise",
        )
    values = {
        **law.__dict__,
        "name": "compute_optimal",
        "formula": "L* = E + A·N*^−α + B·D*^−β, k·N*^κ·D* = 10¹⁵·C",
        "parameters": parameters,
        "covariance": None if spread is None else tuple(map(tuple, spread.tolist())),
        "standard_errors": None
        if spread is None
        else dict(zip(parameters, np.sqrt(np.diag(spread)).tolist(), strict=True)),
        "observed": {**law.observed, "C": pflops},
        "warnings": warnings,
    }
    return ComputeOptimal(**values)
