"""Where the parameters sit: analysis, synthesis, hyper and context networks of each size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hpcm_scale.scaling.laws.fits import fit_power_law
from hpcm_scale.scaling.laws.law import CannotFit, Points
from hpcm_scale.scaling.observations import Observation

CAVEAT = (
    "the parts of a family grow together, so these exponents say how loss goes with each part, "
    "not what enlarging one of them alone would buy"
)


@dataclass(frozen=True)
class SizeParts:
    """One size: its parameters by part, and its loss."""

    model: str
    parameters: int
    parts: dict[str, int]
    """Parameters by part, as `Observation.parts` names them (g_a, g_s, hyper, context)."""
    loss: float
    """Geometric mean over seeds, of the trainings that L(N) rests on."""


@dataclass(frozen=True)
class PartExponent:
    """Log-log OLS of the loss against the parameters of one part."""

    exponent: float
    """α of L ∝ N_part^−α."""
    standard_error: float | None
    """None through two sizes."""
    r: float
    """Pearson's, of the logarithms."""


@dataclass(frozen=True)
class Breakdown:
    """A table of parts, and an exponent for each."""

    sizes: tuple[SizeParts, ...]
    """Ascending in parameters."""
    exponents: dict[str, PartExponent]
    """By part; a part that has one size throughout has none, and none has any where the losses are all equal."""
    caveat: str


def breakdown(points: Points, observations: Sequence[Observation]) -> Breakdown:
    """The parts of each size among `points` (those of L(N)), and how the loss goes with each part.

    `observations` hold the parts of every run of the points.
    """
    by_run = {each.run: each for each in observations}
    sizes: dict[int, list[int]] = {}
    for index, run in enumerate(points.runs):
        sizes.setdefault(by_run[run].parameters, []).append(index)
    table = tuple(
        SizeParts(
            model=points.models[indices[0]],
            parameters=size,
            parts=by_run[points.runs[indices[0]]].parts,
            loss=float(np.exp(np.log(points.loss[indices]).mean())),
        )
        for size, indices in sorted(sizes.items())
    )
    return Breakdown(table, {part: found for part in table[0].parts if (found := _exponent(table, part))}, CAVEAT)


def _exponent(table: Sequence[SizeParts], part: str) -> PartExponent | None:
    counts = [size.parts.get(part, 0) for size in table]
    if min(counts) <= 0 or len(set(counts)) < 2:
        return None
    points = Points.bare([size.loss for size in table], part, N=counts)
    try:
        law = fit_power_law(points)
    except CannotFit:
        return None
    error = law.standard_errors["alpha"] if law.standard_errors else None
    return PartExponent(law.parameters["alpha"], error, law.r)
