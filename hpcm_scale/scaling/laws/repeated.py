"""L(N, D) of a training set that repeats: a pixel that is seen again is worth less than a new one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from scipy.optimize import minimize_scalar

from hpcm_scale.scaling.laws.fits import fit_parameters_and_data
from hpcm_scale.scaling.laws.law import CannotFit, Law, Points, inverse_root

REPETITIONS = (0.1, 1000.0)
"""Range of R*; Muennighoff et al. 2023 find 15.4 for text."""
PLACES = 9
"""Values of R* from which the best one is refined."""


@dataclass(frozen=True)
class RepeatedLaw(Law):
    """L = E + A·N^−α + B·D'^−β with the effective pixels D' of `effective_pixels`; `parameters` also has "R", R*."""

    def log_loss(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """log L at x = (parameters, pixels, pixels of the set) and its derivatives by each parameter."""
        size, pixels, unique = np.broadcast_arrays(*(np.asarray(each, np.float64) for each in x))
        *names, last = self.parameters
        plain = {name: self.parameters[name] for name in names}
        law = Law(**{**self.__dict__, "parameters": plain, "observed": {name: self.observed[name] for name in "ND"}})
        effective, by_repetition = effective_pixels(pixels, unique, self.parameters[last])
        value, gradient = law.log_loss((size, effective))
        by_effective = -plain["beta"] * plain["B"] * effective ** (-plain["beta"] - 1) / np.exp(value)
        return value, np.concatenate([gradient, (by_effective * by_repetition)[None]])


def effective_pixels(pixels: np.ndarray, unique: np.ndarray, repetitions: float) -> tuple[np.ndarray, np.ndarray]:
    """D' = U·(1 + R*·(1 − e^(−(D/U − 1)/R*))) for D > U, else D, and its derivative by R*; float64 of the shape of D.

    Muennighoff et al. 2023 (arXiv 2305.16264), the effective data of its data-constrained law. A set is worth at most
    U·(1 + R*) pixels, however often it repeats.
    """
    again = np.maximum(pixels / unique - 1, 0.0)
    decay = np.exp(-again / repetitions)
    effective = np.where(again > 0, unique * (1 + repetitions * (1 - decay)), pixels)
    return effective, unique * (1 - decay * (1 + again / repetitions))


def fit_repeated(points: Points, unique: np.ndarray) -> RepeatedLaw:
    """The law by least squares of the residuals of log L, R* by a search over the others' best values.

    Args:
        points: variables N (parameters) and D (pixels).
        unique: pixels of each point's training set, images × crop², float64 (n,).

    Raises:
        CannotFit: fewer than two sizes of sets, no run repeats its set, the points do not determine R*, or see
            `fit_parameters_and_data`.
    """
    pixels = points.variables["D"]
    if np.ptp(np.log(unique)) < 0.01:
        raise CannotFit("repetition and amount of data change together in one training set: train on a part of it too")
    if not np.any(pixels > 1.01 * unique):
        raise CannotFit("no run repeats its training set: L(N, D) is enough")
    if len(points) < 7:
        raise CannotFit(f"L(N, D, U) needs 7 trainings, and there are {len(points)}")

    def fitted(log_repetitions: float) -> Law:
        effective, _ = effective_pixels(pixels, unique, math.exp(log_repetitions))
        return fit_parameters_and_data(replace(points, variables={**points.variables, "D": effective}), delta=1.0)

    def deviation(log_repetitions: float) -> float:
        try:
            return fitted(log_repetitions).residual_deviation or 0.0
        except CannotFit:  # no D' varies enough
            return math.inf

    places = np.log(np.geomspace(*REPETITIONS, PLACES))
    fitted(places[-1])  # refuses what L(N, D) cannot tell either
    best = int(np.argmin([deviation(place) for place in places]))
    if best in (0, PLACES - 1):
        worth = "nothing" if best == 0 else "as much as new data"
        raise CannotFit(f"repeated data was worth {worth} in these runs, so that they do not determine R*")
    around = (places[best - 1], places[best + 1])
    place = float(cast(Any, minimize_scalar(deviation, bounds=around, method="bounded", options={"xatol": 1e-4})).x)
    law = fitted(place)
    freedom, error = law.degrees_of_freedom - 1, law.residual_deviation or 0.0
    values = {
        "name": "law_of_repeated_data",
        "formula": "L = E + A·N^−α + B·D'^−β, D' = U·(1 + R*·(1 − e^(−(D/U − 1)/R*))) for D > U",
        "parameters": {**law.parameters, "R": math.exp(place)},
        "degrees_of_freedom": freedom,
        "residual_deviation": error * math.sqrt(law.degrees_of_freedom / freedom),
        "observed": {**points.observed(), "U": (float(unique.min()), float(unique.max()))},
    }
    law = RepeatedLaw(**{**law.__dict__, **values})
    _, gradient = law.log_loss((points.variables["N"], pixels, unique))
    root = values["residual_deviation"] * inverse_root(gradient.T)[0]
    spread = root @ root.T
    errors = dict(zip(law.parameters, np.sqrt(np.diag(spread)).tolist(), strict=True))
    return replace(law, covariance=tuple(map(tuple, spread.tolist())), standard_errors=errors)
