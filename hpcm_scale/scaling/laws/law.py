"""A fitted law of the loss with its covariance and its predictions."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import product
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.optimize import least_squares, nnls


def from_plain(kind: Any, value: Any) -> Any:
    """The inverse of `dataclasses.asdict` after a way through JSON, by type hints.

    Handles dataclasses, tuples, dictionaries, optional values and JSON's own types; a null float becomes NaN. Raises
    TypeError for a value of another type and KeyError for a missing field.
    """
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, Mapping):
            raise TypeError(f"{kind.__name__} must be a dictionary, not {value!r}")
        return kind(**{field.name: from_plain(hints[field.name], value[field.name]) for field in fields(kind)})
    if kind is Any:
        return value
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
    raise TypeError(f"{value!r} is not a {kind}")


# The points of a fit.


class CannotFit(ValueError):
    """The points do not determine the law; the text gives the reason."""


@dataclass(frozen=True, eq=False)
class Points:
    """Trainings that a law is fitted to, one point each: the unit that is held out and resampled."""

    of: str
    """End of the law's name: "parameters", "compute" or "parameters_and_data"."""
    variables: dict[str, np.ndarray]
    """"N" (parameters), "C" (PFLOPs), "D" (pixels): float64 (n,), positive."""
    loss: np.ndarray
    """float64 (n,), positive."""
    runs: tuple[str, ...]
    models: tuple[str, ...]
    data: str
    """Description of the points."""
    warnings: tuple[str, ...] = ()
    """Caveats on their selection."""

    def __post_init__(self) -> None:
        for values in (self.loss, *self.variables.values()):
            if values.shape != (len(self.runs),) or not np.all(np.isfinite(values) & (values > 0)):
                raise ValueError("a law needs positive finite values, one of each per run")

    def __len__(self) -> int:
        return len(self.runs)

    def take(self, chosen: Sequence[int] | np.ndarray) -> Points:
        """The points at these indices, which may repeat."""
        chosen = np.asarray(chosen, int)
        return replace(
            self,
            variables={name: values[chosen] for name, values in self.variables.items()},
            loss=self.loss[chosen],
            runs=tuple(self.runs[index] for index in chosen),
            models=tuple(self.models[index] for index in chosen),
        )

    def different(self, variable: str, tolerance: float = 0.01) -> int:
        """Number of distinct values of a variable, where values within a relative `tolerance` count as equal."""
        steps = np.diff(np.sort(np.log(self.variables[variable])))
        return 1 + int(np.sum(steps > tolerance)) if len(self) else 0

    def require_different_losses(self) -> None:
        """Raise CannotFit if all losses are equal: they determine no exponent, error or correlation."""
        if np.ptp(self.loss) == 0:
            raise CannotFit(f"all losses of {self.data} are equal and do not depend on {' or '.join(self.variables)}")

    def observed(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of each variable."""
        return {name: (float(values.min()), float(values.max())) for name, values in self.variables.items()}


# Fit of L = E + Σ A·x^−α with E, A ≥ 0 to log L by variable projection.


EXPONENTS = (0.01, 4.0)
"""Bounds of every exponent."""
GRID = {1: 48, 2: 10}
"""Grid points of each exponent, by the number of variables."""
STARTS = {1: 2, 2: 6}
"""Number of best grid points that are refined, by the number of variables: noise makes local optima."""
REWEIGHTINGS = 5
"""Iterations of non-negative least squares towards Huber's loss."""
COARSE, TOLERANCE = 1e-8, 1e-15
"""Relative tolerances of the refinement from all starts and from the best, which the first does not bring to its
optimum."""
NEGLIGIBLE = 1e-7
"""Fraction of the loss below which a term is set to zero."""


@dataclass(frozen=True, eq=False)
class SumOfPowers:
    """A fitted L = E + Σ A·(x/centre)^−α; centring makes the problem well conditioned."""

    irreducible: float
    """E."""
    coefficients: np.ndarray
    """A, float64 (variables,), like the two below."""
    exponents: np.ndarray
    centres: np.ndarray
    """Geometric mean of each variable."""
    residuals: np.ndarray
    """Observed minus fitted log L, float64 (n,)."""
    jacobian: np.ndarray
    """Derivatives of fitted log L by E, then A and α of each variable, float64 (n, parameters)."""
    objective: float
    """½·Σr², or the sum of Huber's loss of r."""
    converged: bool


def fit_sum_of_powers(variables: Sequence[np.ndarray], loss: np.ndarray, delta: float | None = None) -> SumOfPowers:
    """Minimise squares, or Huber's loss with threshold `delta`, of the residuals of log L.

    For fixed exponents the law is linear in E and A: non-negative least squares of the relative residuals, reweighted
    for Huber's loss, on a grid of exponents (variable projection, Golub and Pereyra 1973). All parameters are then
    refined together from the best grid points.

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
    results = [_refined(start, logs, loss, delta, COARSE) for _, start in places[: STARTS[len(variables)]]]
    best = min(results, key=lambda result: result.cost)
    best = _refined(best.x, logs, loss, delta, TOLERANCE)
    value, jacobian = _law(best.x, logs)
    irreducible, terms = float(best.x[0]), best.x[1:].reshape(-1, 2)
    residuals = np.log(loss) - np.log(value)
    objective, converged = _objective(residuals, delta), best.status > 0
    return SumOfPowers(irreducible, terms[:, 0], terms[:, 1], centres, residuals, jacobian, objective, converged)


def _law(theta: np.ndarray, logs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L (n,) and the derivatives of log L by theta = (E, A, α, …), (n, parameters)."""
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
    """Objective and theta with the best E and A for these exponents."""
    columns = np.vstack([np.ones(loss.size), np.exp(-exponents[:, None] * logs)]).T / loss[:, None]
    weights = np.ones(loss.size)
    for _ in range(1 if delta is None else REWEIGHTINGS):
        coefficients, _ = nnls(columns * np.sqrt(weights)[:, None], np.sqrt(weights))
        relative = columns @ coefficients
        weights = 1.0 if delta is None else delta / np.maximum(np.abs(relative - 1), delta)
    theta = np.empty(1 + 2 * exponents.size)
    theta[0], theta[1::2], theta[2::2] = coefficients[0], coefficients[1:], exponents
    return _objective(np.log(relative), delta), theta


def _refined(start: np.ndarray, logs: np.ndarray, loss: np.ndarray, delta: float | None, tolerance: float):
    """scipy's result from `start`, with vanishing terms fixed at zero."""
    bottom, top = np.zeros(start.size), np.full(start.size, np.inf)
    bottom[2::2], top[2::2] = EXPONENTS
    robust = {} if delta is None else {"loss": "huber", "f_scale": delta}

    def minimised(theta: np.ndarray, free: np.ndarray):
        def whole(part: np.ndarray) -> np.ndarray:
            full = theta.copy()
            full[free] = part
            return full

        result = least_squares(
            lambda part: np.log(_law(whole(part), logs)[0]) - np.log(loss),
            theta[free],
            lambda part: _law(whole(part), logs)[1][:, free],  # pyright: ignore[reportArgumentType]
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

    result = minimised(start, np.ones(start.size, bool))
    linear = np.arange(start.size) % 2 == 1
    linear[0] = True
    vanished = linear & (result.x < NEGLIGIBLE * loss.min())
    if vanished.any():
        result = minimised(np.where(vanished, 0.0, result.x), ~vanished)
    return result


# Errors of fitted parameters.


def inverse_root(jacobian: np.ndarray) -> tuple[np.ndarray, float]:
    """R with R·Rᵀ = (JᵀJ)⁻¹, and the condition number of J with columns of unit norm.

    Args:
        jacobian: J, float64 (n, p); directions below 1e-12 of the largest singular value count as that.
    """
    norms = np.linalg.norm(jacobian, axis=0)
    norms[norms == 0] = 1.0
    _, singular, rows = np.linalg.svd(jacobian / norms, full_matrices=False)
    singular = np.maximum(singular, 1e-12 * singular[0])
    return (rows.T / singular) / norms[:, None], float(singular[0] / singular[-1])


def derivatives(function: Callable[[dict[str, float]], Any], parameters: Mapping[str, float]) -> np.ndarray:
    """Derivatives of a function of `parameters`, shape S, by each of them: central differences, float64 (p, *S)."""
    columns = []
    for name, value in parameters.items():
        step = 1e-5 * max(abs(value), 1e-3)
        above, below = (function({**parameters, name: value + sign * step}) for sign in (1, -1))
        columns.append((above - below) / (2 * step))
    return np.array(columns)


TERMS = (("A", "alpha"), ("B", "beta"))
"""Coefficient and exponent of the first and of the second variable of a law."""


class Prediction(NamedTuple):
    """Predicted loss and prediction interval of one new training; floats, or float64 arrays of the shape of x.

    `low` and `high` are NaN if the law has no interval.
    """

    value: Any
    low: Any
    high: Any


@dataclass(frozen=True)
class Law:
    """L = E + A·x^−α (+ B·D^−β), fitted to log L. Its fields are those of laws.json.

    A law without irreducible loss has no E.
    """

    name: str
    """"power_law_of_X" or "saturating_power_law_of_X" with X "parameters" or "compute";
    "law_of_parameters_and_data"; or "compute_optimal"."""
    formula: str
    """"L = E + A·N^−α": L loss, N parameters, C PFLOPs of training, D training pixels, E irreducible loss."""
    data: str
    """Description of the points (`Points.data`)."""
    runs: tuple[str, ...]
    """Trainings it was fitted to, one point each."""
    parameters: dict[str, float]
    """"E", "A", "alpha", "B", "beta", as far as the law has them; of the compute-optimal law also "k" and "kappa"."""
    standard_errors: dict[str, float] | None
    """None without degrees of freedom, or if a parameter is not determined."""
    covariance: tuple[tuple[float, ...], ...] | None
    """Covariance of the parameters, in their order."""
    residual_deviation: float | None
    """Residual standard deviation of log L: sqrt(Σr²/degrees of freedom)."""
    degrees_of_freedom: int
    points: int
    """Number of trainings it was fitted to."""
    observed: dict[str, tuple[float, float]]
    """Least and greatest value of each variable ("N", "C", "D") among the points."""
    converged: bool
    r: float | None
    """Pearson's r of log L and log x; for a power law only."""
    warnings: tuple[str, ...]

    @property
    def variables(self) -> tuple[str, ...]:
        """Arguments of `predict`: ("N",), ("C",) or ("N", "D")."""
        return tuple(self.observed)

    @property
    def at_bound(self) -> bool:
        """Whether a fitted exponent is at a bound of `EXPONENTS`; such a law does not extrapolate."""
        low, high = EXPONENTS
        fitted = [self.parameters[name] for _, name in TERMS if name in self.parameters and "E" in self.parameters]
        return any(not 1.01 * low <= exponent <= high / 1.01 for exponent in fitted)

    def predict(self, x: ArrayLike | tuple[ArrayLike, ArrayLike], level: float = 0.95) -> Prediction:
        """Loss at `x` with the prediction interval of one new training.

        Student's t with the delta method on log L (exact for a power law). Simulated coverage at nominal 95 %: 95 % for
        a power law through five sizes.

        Args:
            x: parameters or PFLOPs, any shape; for L(N, D) a pair (parameters, pixels).
            level: probability of the interval.
        """
        value, gradient = self.log_loss(x)
        return self._bounds(value, self._variance(gradient) + self._noise(), level)

    def ratio(self, start: ArrayLike, end: ArrayLike, level: float = 0.95) -> Prediction:
        """L(end)/L(start) with the interval of one new training at `end` against the law at `start`.

        Errors of the parameters that both losses share cancel.
        """
        (first, first_gradient), (last, last_gradient) = self.log_loss(start), self.log_loss(end)
        variance = self._variance(last_gradient - first_gradient) + self._noise()
        return self._bounds(last - first, variance, level)

    def log_loss(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """log L at `x` (see `predict`), float64 of shape S, and its derivatives by each parameter, (p, *S)."""
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

    def _bounds(self, value: np.ndarray, variance: np.ndarray, level: float) -> Prediction:
        """exp(value) with its interval, by Student's t."""
        half = self._quantile(level) * np.sqrt(variance)
        bounds = np.exp(value), np.exp(value - half), np.exp(value + half)
        return Prediction(*(bound.item() if bound.ndim == 0 else bound for bound in bounds))

    def _quantile(self, level: float) -> float:
        """Of Student's t, for a two-sided interval; NaN without degrees of freedom."""
        return float(stats.t.ppf((1 + level) / 2, self.degrees_of_freedom)) if self.degrees_of_freedom else math.nan
