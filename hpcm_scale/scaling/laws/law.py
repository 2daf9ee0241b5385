"""A law of the loss: what was fitted, how sure it is, and what it predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from hpcm_scale.scaling.laws.sum_of_powers import EXPONENTS
from hpcm_scale.scaling.plain import from_plain, to_plain

TERMS = (("A", "alpha"), ("B", "beta"))
"""Names of coefficient and exponent that belong to the first and the second variable of a law."""


class Prediction(NamedTuple):
    """The loss a law expects, and the interval for one new training; floats, or float64 arrays like the x given.

    `low` and `high` are NaN where the law has no interval: as many parameters as observations.
    """

    value: float | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray


@dataclass(frozen=True)
class Law:
    """L = E + A·x^−α (+ B·D^−β), fitted to the logarithm of the loss; needs nothing else to predict.

    The fields are what laws.json holds, to the last digit. E is absent from a law without a floor.
    """

    name: str
    """"power_law_of_parameters", "floor_of_parameters", the same two "…_of_compute" and "…_of_compute_whole",
    "joint", or "compute_optimal"."""
    formula: str
    """"L = E + A·N^−α"; L the loss, N parameters, C PFLOPs of training, D training pixels."""
    data: str
    """What it was fitted to, in words."""
    runs: tuple[str, ...]
    """The trainings it was fitted to, one point each."""
    parameters: dict[str, float]
    """By name: "E", "A", "alpha", "B", "beta"; of a compute-optimal law also "k" and "kappa"."""
    standard_errors: dict[str, float] | None
    """None without degrees of freedom, or where a parameter is not determined."""
    covariance: tuple[tuple[float, ...], ...] | None
    """Of the parameters, in their order."""
    residual_deviation: float | None
    """Standard deviation of log L around the law: sqrt(Σr²/degrees of freedom)."""
    degrees_of_freedom: int
    points: int
    """How many trainings it was fitted to."""
    observed: dict[str, tuple[float, float]]
    """Lowest and highest value of each variable ("N", "C", "D") among them; beyond it is extrapolation."""
    aicc: float | None
    """Akaike's criterion corrected for few points; None with too few points, or of a robust fit."""
    converged: bool
    r: float | None
    """Pearson's r of log L and log x, for a power law."""
    warnings: tuple[str, ...]
    """Sentences."""

    @property
    def variables(self) -> tuple[str, ...]:
        """What `predict` takes: ("N",), ("C",), or ("N", "D")."""
        return tuple(self.observed)

    @property
    def at_edge(self) -> bool:
        """Whether an exponent ended at the edge of the range it was sought in: such a law only describes its points."""
        low, high = EXPONENTS
        fitted = [self.parameters[name] for _, name in TERMS if name in self.parameters and "E" in self.parameters]
        return any(not 1.01 * low <= exponent <= high / 1.01 for exponent in fitted)

    def predict(self, x: ArrayLike | tuple[ArrayLike, ArrayLike], level: float = 0.95) -> Prediction:
        """The loss at `x`, and between what bounds one new training there comes out with probability `level`.

        Student's t, by the delta method on log L (exact for a power law). Simulated at nominal 95 %
        (tests/scaling/test_scaling_trust.py): 95 % for a power law through five sizes.

        Args:
            x: parameters, or PFLOPs, any shape; for the joint law a pair (parameters, pixels).
            level: probability that the interval holds.
        """
        value, gradient = self.log_loss(x)
        half = self._half_width(self._variance(gradient) + self._noise(), level)
        bounds = np.exp(value), np.exp(value - half), np.exp(value + half)
        return Prediction(*(bound.item() if bound.ndim == 0 else bound for bound in bounds))

    def change(self, start: ArrayLike, end: ArrayLike, level: float = 0.95) -> Prediction:
        """L(end) − L(start), with the interval for one new training at `end` against the law at `start`.

        What both losses share of the parameters' errors cancels here.
        """
        (first, first_gradient), (last, last_gradient) = self.log_loss(start), self.log_loss(end)
        gradient = np.exp(last) * last_gradient - np.exp(first) * first_gradient
        variance = self._variance(gradient) + np.exp(2 * last) * self._noise()
        value, half = np.exp(last) - np.exp(first), self._half_width(variance, level)
        bounds = value, value - half, value + half
        return Prediction(*(bound.item() if bound.ndim == 0 else bound for bound in bounds))

    def log_loss(self, x: ArrayLike | tuple[ArrayLike, ArrayLike]) -> tuple[np.ndarray, np.ndarray]:
        """log L at `x` (shape S, float64) and its derivatives by each parameter (p, *S)."""
        inputs = np.broadcast_arrays(*(np.asarray(x, np.float64),)) if len(self.variables) == 1 else x
        inputs = np.broadcast_arrays(*(np.asarray(each, np.float64) for each in inputs))
        loss = np.full(inputs[0].shape, self.parameters.get("E", 0.0))
        gradient = {"E": np.ones_like(loss)} if "E" in self.parameters else {}
        for (coefficient, exponent), each in zip(TERMS, inputs, strict=False):
            power = each ** -self.parameters[exponent]
            loss = loss + self.parameters[coefficient] * power
            gradient[coefficient] = power
            gradient[exponent] = -self.parameters[coefficient] * power * np.log(each)
        return np.log(loss), np.stack([gradient[name] for name in self.parameters]) / loss

    def _variance(self, gradient: np.ndarray) -> np.ndarray:
        if self.covariance is None:
            return np.full(gradient.shape[1:], np.nan)
        return np.maximum(np.einsum("i...,ij,j...->...", gradient, np.array(self.covariance), gradient), 0.0)

    def _noise(self) -> float:
        return np.nan if self.residual_deviation is None else self.residual_deviation**2

    def _half_width(self, variance: np.ndarray, level: float) -> np.ndarray:
        if self.degrees_of_freedom < 1:
            return np.full_like(variance, np.nan)
        return stats.t.ppf((1 + level) / 2, self.degrees_of_freedom) * np.sqrt(variance)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Law:
        """What `to_dict` gave, also after a way through JSON. Raises TypeError or KeyError for anything else."""
        return from_plain(cls, values)
