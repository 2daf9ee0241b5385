"""Which trainings each law is fitted to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpcm_scale.scaling.frontier import FrontierPoint
from hpcm_scale.scaling.laws.law import CannotFit, Points
from hpcm_scale.scaling.observations import Observation
from hpcm_scale.scaling.wording import count

SAME = 0.01
"""Amounts of data within a hundredth count as one: batches rarely end on the very pixel."""


def ordered(observations: Sequence[Observation]) -> list[Observation]:
    """By parameters, pixels, seed and name: an order that does not depend on how the runs were named on a call."""
    return sorted(observations, key=lambda each: (each.parameters, each.pixels, each.seed, each.run))


def trained(observations: Sequence[Observation]) -> tuple[list[Observation], tuple[str, ...]]:
    """The annealed observations, or all of them with a warning where none is; in order."""
    annealed = [each for each in ordered(observations) if each.annealed]
    if annealed or not observations:
        return annealed, ()
    return ordered(observations), (
        "no run's learning rate had decayed at its end: the losses lie above what these sizes can reach, "
        "by different amounts; train decay branches (hpcm cooldown)",
    )


def of_parameters(observations: Sequence[Observation]) -> Points:
    """Points of L(N): one annealed training of each size, model and seed, at the most data that all sizes share.

    Where no amount of data is shared by all sizes, each size comes with its longest training, and a warning: such a
    law mixes what size buys with what data buys. Unannealed trainings are used only if there are no others. Raises
    CannotFit without any observation.
    """
    usable, warnings = trained(observations)
    if not usable:
        raise CannotFit("there is no trained model yet")
    missing = sorted({each.model for each in observations} - {each.model for each in usable})
    if missing:
        warnings += (f"left out of L(N), as their learning rate had not decayed: {', '.join(missing)}",)
    sizes = sorted({each.parameters for each in usable})
    amounts = sorted({each.pixels for each in usable}, reverse=True)
    shared = next((at for at in amounts if all(_at(usable, size, at) for size in sizes)), None)
    chosen = []
    for size in sizes:
        longest = max(each.pixels for each in usable if each.parameters == size)
        at = _at(usable, size, longest if shared is None else shared)
        # The last of each model and seed, in order of pixels and name.
        chosen += {(each.model, each.seed): each for each in at}.values()
    kind = "annealed trainings" if chosen[0].annealed else "trainings, not annealed"
    if shared is None:
        data = f"{kind}, each size's longest"
        least, most = (pick(chosen, key=lambda each: each.pixels) for pick in (min, max))
        warnings += (
            f"the sizes share no amount of training data ({least.model} had {count(least.pixels)} pixels, {most.model} "
            f"{count(most.pixels)}), so L(N) mixes what size and data buy; the joint law keeps them apart",
        )
    else:
        data = f"{kind} on {count(shared)} pixels" + (", the most that all sizes share" if shared < amounts[0] else "")
    return _points("parameters", {"N": [each.parameters for each in chosen]}, chosen, data, warnings)


def of_compute(frontier: Sequence[FrontierPoint], *, whole: bool) -> Points:
    """Points of L(C): the last point of each run on the frontier, so that degrees of freedom count trainings.

    Raises CannotFit without any point.
    """
    if not frontier:
        raise CannotFit("no run is on the annealed frontier yet: no learning rate has decayed")
    last = {point.run: point for point in sorted(frontier, key=lambda point: (point.pflops, point.run))}
    chosen = sorted(last.values(), key=lambda point: (point.pflops, point.run))
    warnings = (
        "the points of a frontier are the best of several runs, and branches share their trunk: they are not "
        "independent, and the interval is somewhat too narrow",
    )
    if whole and not all(point.annealed for point in chosen):
        warnings += ("learning rates had not decayed at some points: the whole frontier mixes two kinds of loss",)
    if len({point.parameters for point in chosen}) == 1:
        warnings += (f"{chosen[0].model} alone is on it: this law of compute says what more data buys one size",)
    kind = "the whole frontier" if whole else "the annealed frontier"
    data = f"each run's last point on {kind} ({len(frontier)} points in all)"
    of = "compute_whole" if whole else "compute"
    return _points(of, {"C": [point.pflops for point in chosen]}, chosen, data, warnings)


def of_both(observations: Sequence[Observation]) -> Points:
    """Points of L(N, D): every annealed training (every training, with a warning, if none is annealed).

    Raises CannotFit without any observation.
    """
    usable, warnings = trained(observations)
    if not usable:
        raise CannotFit("there is no trained model yet")
    if any(each.cooldown_of for each in usable):
        warnings += ("branches share their trunk: they are not independent, and the interval is somewhat too narrow",)
    kind = "annealed trainings" if usable[0].annealed else "trainings, not annealed"
    variables = {"N": [each.parameters for each in usable], "D": [each.pixels for each in usable]}
    return _points("both", variables, usable, f"{len(usable)} {kind}", warnings)


def costs(observations: Sequence[Observation]) -> tuple[np.ndarray, np.ndarray]:
    """Parameters (n,) of each size, ascending, and its training FLOP per pixel (n,), mean over its runs; float64."""
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
