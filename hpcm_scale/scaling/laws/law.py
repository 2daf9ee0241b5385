"""A law of the loss: what was fitted, how sure it is, and what it predicts."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from itertools import product
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.optimize import least_squares, nnls

# Dataclasses to plain values for JSON and back, by their type hints.


T = TypeVar("T")

to_plain = asdict
"""Dataclasses become dictionaries, tuples stay and become lists in JSON; the order of fields and keys is kept."""


def from_plain(kind: type[T], value: Any) -> T:
    """The value of type `kind` that was made plain and went through JSON.

    Knows dataclasses, tuples, dictionaries, optional values and JSON's own types. Raises TypeError for a value of
    another type, and KeyError for a missing field. A number that is null was not finite, and becomes NaN.
    """
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, Mapping):
            raise TypeError(f"{kind.__name__} is a dictionary, not {value!r}")
        return kind(**{field.name: from_plain(hints[field.name], value[field.name]) for field in fields(kind)})
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return from_plain(next(each for each in inner if each is not type(None)), value)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(from_plain(each, item) for each, item in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: from_plain(inner[1], item) for key, item in value.items()}
    if kind is float and value is None:
        return math.nan
    if origin is None and (isinstance(value, kind) or (kind is float and type(value) is int)):
        return kind(value)
    raise TypeError(f"{value!r} is no {kind}")


# What a law is fitted to: trainings, one point each.


class CannotFit(ValueError):
    """The points do not determine the law: the text is a sentence that says why."""


@dataclass(frozen=True, eq=False)
class Points:
    """Trainings that a law is fitted to, one point each, so that what is left out or resampled is a training."""

    of: str
    """Ends the law's name: "parameters", "compute", "compute_whole"; "both" for the joint law."""
    variables: dict[str, np.ndarray]
    """"N" (parameters), "C" (PFLOPs), "D" (pixels): float64 (n,), positive."""
    loss: np.ndarray
    """float64 (n,), positive."""
    runs: tuple[str, ...]
    models: tuple[str, ...]
    data: str = ""
    """What they are, in words."""
    warnings: tuple[str, ...] = ()
    """On their choice: sentences."""

    def __post_init__(self) -> None:
        for values in (self.loss, *self.variables.values()):
            if values.shape != (len(self.runs),) or not np.all(np.isfinite(values) & (values > 0)):
                raise ValueError("a law is fitted to positive finite numbers, one of each per run")

    @classmethod
    def bare(cls, loss: np.ndarray, of: str, **variables: np.ndarray) -> Points:
        """Points of numbers alone, for data that come from no run."""
        names = tuple(f"point {index + 1}" for index in range(len(loss)))
        arrays = {name: np.asarray(values, np.float64) for name, values in variables.items()}
        return cls(of, arrays, np.asarray(loss, np.float64), names, names)

    def __len__(self) -> int:
        return len(self.runs)

    def take(self, chosen: Sequence[int] | np.ndarray) -> Points:
        """The points of these indices, which may repeat."""
        chosen = np.asarray(chosen, int)
        return replace(
            self,
            variables={name: values[chosen] for name, values in self.variables.items()},
            loss=self.loss[chosen],
            runs=tuple(self.runs[index] for index in chosen),
            models=tuple(self.models[index] for index in chosen),
        )

    def different(self, variable: str, tolerance: float = 0.01) -> int:
        """How many values of a variable differ by more than a hundredth (a run is rarely ended on the very pixel)."""
        steps = np.diff(np.sort(np.log(self.variables[variable])))
        return 1 + int(np.sum(steps > tolerance)) if len(self) else 0

    def require_different_losses(self) -> None:
        """Raise CannotFit where all losses are equal: no exponent, error or correlation follows from them."""
        if np.ptp(self.loss) == 0:
            raise CannotFit(f"all losses{self.origin} are equal, so they say nothing of {' or '.join(self.variables)}")

    @property
    def origin(self) -> str:
        """Ends a sentence on how many there are: " among …", or nothing for bare numbers."""
        return f" among {self.data}" if self.data else ""

    def observed(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of each variable."""
        return {name: (float(values.min()), float(values.max())) for name, values in self.variables.items()}


# Fitting L = E + Σ A·x^−α with E, A ≥ 0, to log L, by variable projection.


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
