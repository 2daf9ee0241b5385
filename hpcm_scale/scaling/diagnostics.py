"""Diagnostics of a law: residuals and held-out predictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import numpy as np

from hpcm_scale.scaling.laws.law import CannotFit, Law, Points, Prediction

Fit = Callable[[Points], Law]


@dataclass(frozen=True)
class Residual:
    """Residual of one point of a fit."""

    run: str
    model: str
    x: tuple[float, ...]
    """Values of the law's variables: (N,), (C,) or (N, D)."""
    observed: float
    predicted: float
    log_residual: float
    """log(observed / predicted)."""


@dataclass(frozen=True)
class HeldOut:
    """Prediction at a point that was held out of the fit."""

    run: str
    model: str
    x: tuple[float, ...]
    observed: float
    predicted: float
    low: float | None
    """None, like `high` and `inside`, if the law of the other points has no interval."""
    high: float | None
    inside: bool | None
    error: float
    """predicted / observed − 1."""


@dataclass(frozen=True)
class Diagnostics:
    """Diagnostics of one law."""

    residuals: tuple[Residual, ...]
    leave_one_out: tuple[HeldOut, ...]
    """Each training held out in turn, except those without which there is no law."""
    largest: tuple[HeldOut, ...]
    """Trainings of the largest size (for L(C), the one with most compute), predicted from all others."""
    largest_refused: str | None
    """Why the other trainings determine no law, if `largest` is empty."""


def diagnose(fit: Fit, points: Points, law: Law, *, level: float = 0.95) -> Diagnostics:
    """Residuals, leave-one-out and largest-held-out predictions of `law`, which is `fit(points)`."""
    first = next(iter(points.variables.values()))
    each_out = [_held_out(fit, points, np.arange(len(points)) == index, level)[0] for index in range(len(points))]
    leave_one_out = tuple(chain.from_iterable(each_out))
    largest, refused = _held_out(fit, points, first == first.max(), level)
    return Diagnostics(_residuals(law, points), leave_one_out, largest, refused)


def _x(points: Points, index: int) -> tuple[float, ...]:
    return tuple(float(values[index]) for values in points.variables.values())


def _predict(law: Law, x: tuple[float, ...], level: float = 0.95) -> Prediction:
    return law.predict(x[0] if len(x) == 1 else x, level)


def _residuals(law: Law, points: Points) -> tuple[Residual, ...]:
    residuals = []
    for index, (run, model) in enumerate(zip(points.runs, points.models, strict=True)):
        x, observed = _x(points, index), float(points.loss[index])
        predicted = _predict(law, x).value
        residuals.append(Residual(run, model, x, observed, predicted, math.log(observed / predicted)))
    return tuple(residuals)


def _held_out(fit: Fit, points: Points, out: np.ndarray, level: float) -> tuple[tuple[HeldOut, ...], str | None]:
    """Predictions at the points `out`, bool (n,), from the others; or none and the reason if those have no law."""
    try:
        law = fit(points.take(np.flatnonzero(~out)))
    except CannotFit as refusal:
        return (), str(refusal)
    held = []
    for index in np.flatnonzero(out).tolist():
        x, observed = _x(points, index), float(points.loss[index])
        value, low, high = _predict(law, x, level)
        known = not math.isnan(low)
        held.append(
            HeldOut(
                run=points.runs[index],
                model=points.models[index],
                x=x,
                observed=observed,
                predicted=value,
                low=low if known else None,
                high=high if known else None,
                inside=low <= observed <= high if known else None,
                error=value / observed - 1,
            )
        )
    return tuple(held), None
