"""The best learning rate against the length of a run: rate ∝ images^−γ, from runs at several rates and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from hpcm_scale.errors import UserError
from hpcm_scale.formatting import count, significant, terminal, terminal_table
from hpcm_scale.scaling.observations import Observation

RATES = 3
"""Least number of rates at one length: a parabola in log rate."""


@dataclass(frozen=True)
class Best:
    """The best rate of one size at one length."""

    model: str
    images: float
    rates: int
    learning_rate: float
    loss: float
    """Of the parabola at its minimum."""


@dataclass(frozen=True)
class Horizon:
    """The rate `learning_rate`·(images/`images`)^−`exponent`."""

    best: tuple[Best, ...]
    learning_rate: float
    images: float
    """Geometric mean of the lengths."""
    exponent: float
    standard_error: float | None
    """Of the exponent; None with two lengths."""

    @property
    def override(self) -> str:
        """The override that gives a run the rate of its own length."""
        return f"schedule.learning_rate='${{horizon:{self.learning_rate:.3g},{self.images:.3g},{self.exponent:.3g}}}'"


def fit_horizon(observations: Sequence[Observation]) -> Horizon:
    """Fit γ to the minima of parabolas of log loss over log learning rate, one for each size and length.

    Sizes may differ by a factor of the rate each (under muP they should not): the slope over log images is common.

    Raises:
        UserError: no two lengths of one size have three rates or more with a minimum between them.
    """
    groups: dict[tuple[str, int], list[Observation]] = {}
    for each in observations:
        if each.learning_rate:
            groups.setdefault((each.model, each.images), []).append(each)
    best = [found for group in groups.values() if (found := _minimum(group))]
    lengths: dict[str, list[Best]] = {}
    for found in best:
        lengths.setdefault(found.model, []).append(found)
    usable = [each for of_model in lengths.values() if len({each.images for each in of_model}) > 1 for each in of_model]
    if not usable:
        raise UserError(
            "no-rate-against-length",
            "RUN",
            f"no size has two lengths with {RATES} learning rates or more whose best lies between them; train each "
            "length at rates a factor of two apart, until the loss rises on both sides",
        )
    models = sorted({each.model for each in usable})
    means = {model: tuple(np.mean([_logs(each) for each in usable if each.model == model], axis=0)) for model in models}
    images, rates = np.array([np.subtract(_logs(each), means[each.model]) for each in usable]).T
    slope = float(images @ rates / (images @ images))
    freedom = len(usable) - len(models) - 1
    error = float(np.sqrt(np.sum((rates - slope * images) ** 2) / freedom / (images @ images))) if freedom else None
    centre = np.exp(np.mean(list(means.values()), axis=0))
    return Horizon(tuple(best), float(centre[1]), float(centre[0]), -slope, error)


def _logs(best: Best) -> tuple[float, float]:
    return float(np.log(best.images)), float(np.log(best.learning_rate))


def _minimum(group: Sequence[Observation]) -> Best | None:
    """The minimum of a parabola, None if it is not between the rates; of several seeds of a rate, all count."""
    rates = np.log([cast(float, each.learning_rate) for each in group])
    if np.unique(rates).size < RATES:
        return None
    losses = np.log([each.loss for each in group])
    # Far from the minimum the loss is no parabola: only rates within 20 % of the lowest loss.
    near = losses <= losses.min() + np.log(1.2)
    if np.unique(rates[near]).size < RATES:
        near = np.isin(
            rates, np.unique(rates)[np.argsort([losses[rates == rate].min() for rate in np.unique(rates)])[:3]]
        )
    a, b, c = (float(value) for value in np.polyfit(rates[near] - rates.mean(), losses[near], 2))
    place = rates.mean() - b / (2 * a) if a > 0 else np.inf
    if not rates.min() < place < rates.max():
        return None
    first = group[0]
    return Best(
        first.model, first.images, np.unique(rates).size, float(np.exp(place)), float(np.exp(c - b**2 / (4 * a)))
    )


def print_horizon(found: Horizon) -> None:
    """Print the best rates, γ and the override."""
    console = terminal()
    rows = [
        [each.model, count(each.images), str(each.rates), significant(each.learning_rate, 3), f"{each.loss:.4f}"]
        for each in found.best
    ]
    console.print(terminal_table(["model", "images", "rates", "best rate", "its loss"], rows))
    error = "" if found.standard_error is None else f" ± {found.standard_error:.3f}"
    console.print(
        f"The best learning rate goes with images^−γ, γ = {found.exponent:.3f}{error}; {found.learning_rate:.3g} at "
        f"{count(found.images)} images.",
        soft_wrap=True,
    )
    print(found.override)
