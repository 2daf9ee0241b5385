"""How far a law may be trusted: what it says of trainings it has not seen."""

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
    """One point of a fit and how far it lies from the law."""

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
    """A point the law was not fitted to, and what the law says of it."""

    run: str
    model: str
    x: tuple[float, ...]
    observed: float
    predicted: float
    low: float | None
    """None, like `high` and `inside`, where the law fitted to the rest has no interval."""
    high: float | None
    inside: bool | None
    error: float
    """predicted / observed − 1."""


@dataclass(frozen=True)
class Bootstrap:
    """Percentile intervals over resampled trainings: narrower than they should be for few of them.

    Resampling pairs held 90 % at nominal 95 % through five sizes, where Student's t held 95.5 %.
    """

    resamples: int
    failed: int
    """Resamples that carried no law (too few different sizes); not in the intervals."""
    unit: str
    """What was resampled: "runs", or "seeds within each size"."""
    level: float
    parameters: dict[str, tuple[float, float]]
    at: tuple[float, ...]
    """Ten times the largest of each variable."""
    at_ten_times: tuple[float, float]
    """The law's loss there, without the noise of one new training."""


@dataclass(frozen=True)
class Trust:
    """What speaks for and against one law."""

    residuals: tuple[Residual, ...]
    leave_one_out: tuple[HeldOut, ...]
    """Each training left out in turn, but for those without which there is no law."""
    largest: tuple[HeldOut, ...]
    """The trainings of the largest size (over compute: the one with most), predicted from all others."""
    largest_refused: str | None
    """Why the other trainings carry no law, where there is no `largest`."""
    bootstrap: Bootstrap | None
    bootstrap_refused: str | None


def examine(fit: Fit, points: Points, law: Law, *, level: float = 0.95) -> Trust:
    """Residuals, leave-one-out and hold-out-largest of a law; `fit` is what made `law` of `points`."""
    first = next(iter(points.variables.values()))
    each_out = [_held_out(fit, points, np.arange(len(points)) == index, level)[0] for index in range(len(points))]
    leave_one_out = tuple(chain.from_iterable(each_out))
    largest, refused = _held_out(fit, points, first == first.max(), level)
    return Trust(_residuals(law, points), leave_one_out, largest, refused, None, None)


def bootstrap(
    fit: Fit, points: Points, resamples: int, *, level: float = 0.95, advance: Callable[[], object] = lambda: None
) -> Bootstrap:
    """Refit to trainings drawn with replacement, never checkpoints of one; deterministic (seed 0).

    Where each place (size, or size and data) has two trainings or more, they are drawn within each place, so that the
    spread is that over seeds; otherwise all are drawn together.

    Args:
        fit: what makes a law of points.
        points: the trainings.
        resamples: how often.
        level: probability of the percentile intervals.
        advance: called after each resample.

    Raises:
        CannotFit: fewer than half of the resamples carried a law.
    """
    generator = np.random.default_rng(0)
    places, place = np.unique(np.stack(list(points.variables.values())), axis=1, return_inverse=True)
    groups = [np.flatnonzero(place == each) for each in range(places.shape[1])]
    within = min(map(len, groups)) > 1
    if not within:
        groups = [np.arange(len(points))]
    at = tuple(10 * high for _, high in points.observed().values())
    drawn, losses, names = [], [], ()
    for _ in range(resamples):
        chosen = np.concatenate([generator.choice(group, group.size) for group in groups])
        advance()
        try:
            law = fit(points.take(np.sort(chosen)))
        except CannotFit:
            continue
        names = tuple(law.parameters)
        drawn.append(list(law.parameters.values()))
        losses.append(_predict(law, at).value)
    if len(drawn) < max(resamples / 2, 1):
        raise CannotFit(f"only {len(drawn)} of {resamples} resamples have enough different sizes for this law")
    ends = [(1 - level) / 2, (1 + level) / 2]
    intervals = np.quantile(np.array(drawn), ends, axis=0).T.tolist()
    return Bootstrap(
        resamples=resamples,
        failed=resamples - len(drawn),
        unit="seeds within each size" if within else "runs",
        level=level,
        parameters={name: tuple(interval) for name, interval in zip(names, intervals, strict=True)},
        at=at,
        at_ten_times=tuple(np.quantile(losses, ends).tolist()),
    )


def _x(points: Points, index: int) -> tuple[float, ...]:
    return tuple(float(values[index]) for values in points.variables.values())


def _predict(law: Law, x: tuple[float, ...], level: float = 0.95) -> Prediction:
    return law.predict(x if len(x) > 1 else x[0], level)


def _residuals(law: Law, points: Points) -> tuple[Residual, ...]:
    residuals = []
    for index, (run, model) in enumerate(zip(points.runs, points.models, strict=True)):
        x, observed = _x(points, index), float(points.loss[index])
        predicted = _predict(law, x).value
        residuals.append(Residual(run, model, x, observed, predicted, math.log(observed / predicted)))
    return tuple(residuals)


def _held_out(fit: Fit, points: Points, out: np.ndarray, level: float) -> tuple[tuple[HeldOut, ...], str | None]:
    """What the law of the other points says of those in `out`, bool (n,); nothing, and why, if they carry no law."""
    try:
        law = fit(points.take(np.flatnonzero(~out)))
    except CannotFit as refusal:
        return (), str(refusal)
    held = []
    for index in np.flatnonzero(out):
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
