"""The points that each law is fitted to: trainings, and the frontier of loss against compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpcm_scale.formatting import count, counted
from hpcm_scale.scaling.laws.law import CannotFit, Points
from hpcm_scale.scaling.observations import Curve, Observation

# The frontier: the lowest loss of any run at each compute.


SPACING = 0.0125
"""Decades of compute per frontier point of one curve: a quarter of the smoothing window, below which points add
nothing. A longer journal has no more weight."""


@dataclass(frozen=True)
class FrontierPoint:
    """One point of the frontier."""

    run: str
    model: str
    parameters: int
    pixels: float
    pflops: float
    loss: float
    """Of the smoothed curve."""
    annealed: bool


def frontier(curves: Sequence[Curve]) -> list[FrontierPoint]:
    """The lower envelope of the smoothed curves, ascending in compute and strictly descending in loss.

    A point of a curve is on it if no other curve, interpolated linearly in log-log, is lower at that compute, and no
    point with less compute is as low. The order of `curves` does not matter.

    A minimum over noisy points is biased low; smoothing removes most of the bias. Measured on eight sizes with
    deviation σ per line, as mean over the frontier: within 0.03 σ at 4,000 and at 400 lines a run, 0.13 σ at 100;
    `running_minimum` of the same lines is 0.9 to 3 σ too low. Runs of one size, which only noise orders, are the worst
    case: 0.07 σ too low for ten seeds of 4,000 lines, 0.4 σ for ten of 100.
    """
    curves = sorted(curves, key=lambda curve: (curve.parameters, curve.run, curve.pflops[-1]))
    if not curves:
        return []
    candidates = [_spaced(curve.pflops) for curve in curves]
    owner = np.repeat(np.arange(len(curves)), [rows.size for rows in candidates])
    row = np.concatenate(candidates)
    compute, loss = (
        np.concatenate([getattr(curve, name)[rows] for curve, rows in zip(curves, candidates, strict=True)])
        for name in ("pflops", "smoothed")
    )
    chosen = running_minimum(compute, loss)
    lowest = np.full(chosen.size, np.inf)
    for number, curve in enumerate(curves):
        here = np.interp(
            np.log(compute[chosen]), np.log(curve.pflops), np.log(curve.smoothed), left=np.inf, right=np.inf
        )
        lowest = np.minimum(lowest, np.where(owner[chosen] == number, np.inf, here))
    chosen = chosen[np.log(loss[chosen]) <= lowest]
    return [_point(curves[one], index) for one, index in zip(owner[chosen], row[chosen], strict=True)]


def _spaced(pflops: np.ndarray) -> np.ndarray:
    """Indices of the last point in each SPACING of compute, on a grid common to all curves."""
    return np.flatnonzero(np.diff(np.floor(np.log10(pflops) / SPACING), append=np.inf))


def _point(curve: Curve, index: int) -> FrontierPoint:
    return FrontierPoint(
        run=curve.run,
        model=curve.model,
        parameters=curve.parameters,
        pixels=float(curve.pixels[index]),
        pflops=float(curve.pflops[index]),
        loss=float(curve.smoothed[index]),
        annealed=bool(curve.annealed[index]),
    )


def running_minimum(compute: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of the points strictly below every point with less compute, ascending in compute.

    Takes float64 (n,) arrays in any order; of points with equal compute the lowest counts. This is the usual frontier
    over all checkpoints. Of k noisy points it takes the lowest: 1.5 (k = 10) to 2.5 (k = 100) deviations too low.
    """
    order = np.lexsort((loss, compute))
    before = np.minimum.accumulate(np.append(np.inf, loss[order]))[:-1]
    return order[loss[order] < before]


def losses_at(curves: Sequence[Curve], pflops: float) -> list[tuple[int, float, bool]]:
    """Of each size whose runs span the compute `pflops`: parameters, lowest loss there, and whether it is annealed.

    The loss of a run between two lines is interpolated in log-log; it is annealed if the line before is.
    """
    lowest: dict[int, tuple[float, bool]] = {}
    for curve in curves:
        if curve.pflops[0] <= pflops <= curve.pflops[-1]:
            loss = float(np.exp(np.interp(np.log(pflops), np.log(curve.pflops), np.log(curve.smoothed))))
            before = int(np.searchsorted(curve.pflops, pflops, side="right")) - 1
            found = (loss, bool(curve.annealed[before]))
            lowest[curve.parameters] = min(lowest.get(curve.parameters, found), found)
    return [(size, *found) for size, found in sorted(lowest.items())]


# Points of L(N), L(C) and L(N, D).


SAME = 0.01
"""Largest difference in log pixels of equal amounts of data: a batch rarely ends at the same pixel."""
DEPENDENT = "cooldowns share their constant-rate run: points are dependent, and the interval is somewhat too narrow"


def ordered(observations: Sequence[Observation]) -> list[Observation]:
    """Observations by parameters, pixels, seed and name."""
    return sorted(observations, key=lambda each: (each.parameters, each.pixels, each.seed, each.run))


def usable(observations: Sequence[Observation]) -> tuple[list[Observation], tuple[str, ...]]:
    """The annealed observations, or all of them and a warning if none is annealed; ordered."""
    annealed = [each for each in ordered(observations) if each.annealed]
    if annealed or not observations:
        return annealed, ()
    return ordered(observations), (
        "no learning rate had decayed at the end of training: the losses are above what these sizes can reach, by "
        "different amounts; train cooldowns (hpcm cooldown)",
    )


def of_parameters(observations: Sequence[Observation]) -> Points:
    """Points of L(N): the annealed trainings of each size at the most data that all sizes share.

    If no amount of data is shared by all sizes, the longest training of each size is used, with a warning: such a law
    mixes the effects of size and data. Trainings that are not annealed are used only if there are no others. Raises
    CannotFit without observations.
    """
    trained, warnings = usable(observations)
    if not trained:
        raise CannotFit("there is no trained model yet")
    missing = sorted({each.model for each in observations} - {each.model for each in trained})
    if missing:
        warnings += (f"excluded from L(N), since their learning rate had not decayed: {', '.join(missing)}",)
    sizes = sorted({each.parameters for each in trained})
    amounts = sorted({each.pixels for each in trained}, reverse=True)
    shared = next((at for at in amounts if all(_at(trained, size, at) for size in sizes)), None)
    chosen = []
    for size in sizes:
        longest = max(each.pixels for each in trained if each.parameters == size)
        at = _at(trained, size, longest if shared is None else shared)
        chosen += at
    kind = "annealed trainings" if chosen[0].annealed else "trainings, not annealed"
    if shared is None:
        data = f"{kind}, the longest of each size"
        least, most = (pick(chosen, key=lambda each: each.pixels) for pick in (min, max))
        warnings += (
            f"the sizes share no amount of training data ({least.model} had {count(least.pixels)} pixels, {most.model} "
            f"{count(most.pixels)}), so L(N) mixes the effects of size and data; L(N, D) separates them",
        )
    else:
        data = f"{kind} on {count(shared)} pixels" + (", the most that all sizes share" if shared < amounts[0] else "")
    return _points("parameters", {"N": [each.parameters for each in chosen]}, chosen, data, warnings)


def of_compute(frontier: Sequence[FrontierPoint]) -> Points:
    """Points of L(C): the last annealed frontier point of each run, so that degrees of freedom count trainings.

    If no point is annealed, the last point of each run, with a warning. Raises CannotFit without points.
    """
    if not frontier:
        raise CannotFit("there is no frontier")
    annealed = [point for point in frontier if point.annealed]
    used = annealed or frontier
    last = {point.run: point for point in sorted(used, key=lambda point: (point.pflops, point.run))}
    chosen = sorted(last.values(), key=lambda point: (point.pflops, point.run))
    warnings = (f"frontier points are the best of several runs, and {DEPENDENT}",)
    if not annealed:
        warnings += ("no learning rate had decayed on the frontier: L(C) is above what this compute can reach",)
    if len({point.parameters for point in chosen}) == 1:
        warnings += (f"only {chosen[0].model} is on the frontier: this L(C) gives the effect of data at one size",)
    kind = "annealed frontier" if annealed else "frontier, not annealed"
    data = f"each run's last point on the {kind} ({counted(len(used), 'point')} in all)"
    return _points("compute", {"C": [point.pflops for point in chosen]}, chosen, data, warnings)


def of_parameters_and_data(observations: Sequence[Observation]) -> Points:
    """Points of L(N, D): every annealed training, or every training, with a warning, if none is annealed.

    Raises CannotFit without observations.
    """
    trained, warnings = usable(observations)
    if not trained:
        raise CannotFit("there is no trained model yet")
    if any(each.cooldown_of for each in trained):
        warnings += (DEPENDENT,)
    kind = "annealed trainings" if trained[0].annealed else "trainings, not annealed"
    variables = {"N": [each.parameters for each in trained], "D": [each.pixels for each in trained]}
    return _points("parameters_and_data", variables, trained, f"{len(trained)} {kind}", warnings)


def costs(observations: Sequence[Observation]) -> tuple[np.ndarray, np.ndarray]:
    """Parameters of each size, ascending, and its mean training FLOP per pixel over runs; float64 (n,) each."""
    sizes: dict[int, list[float]] = {}
    for each in ordered(observations):
        sizes.setdefault(each.parameters, []).append(each.flops_per_pixel)
    return np.array(list(sizes), np.float64), np.array([np.mean(values) for values in sizes.values()])


def _at(observations: Sequence[Observation], size: int, pixels: float) -> list[Observation]:
    return [each for each in observations if each.parameters == size and abs(np.log(each.pixels / pixels)) <= SAME]


def _points(
    of: str,
    variables: dict[str, list[float]],
    chosen: Sequence[Observation] | Sequence[FrontierPoint],
    data: str,
    warnings: tuple[str, ...],
) -> Points:
    return Points(
        of=of,
        variables={name: np.array(values, np.float64) for name, values in variables.items()},
        loss=np.array([each.loss for each in chosen], np.float64),
        runs=tuple(each.run for each in chosen),
        models=tuple(each.model for each in chosen),
        data=data,
        warnings=warnings,
    )
