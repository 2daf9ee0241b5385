"""The headline of an analysis and its caveats as sentences, the same in report, terminal, plan and wandb."""

from __future__ import annotations

import math
from collections.abc import Callable

from hpcm_scale.formatting import count, percent, significant
from hpcm_scale.scaling.analysis import PARAMETER_LAWS, Analysis
from hpcm_scale.scaling.laws.fits import ENOUGH
from hpcm_scale.scaling.laws.law import Law, Prediction

AHEAD = 10
"""Multiple of the largest size for which the headline predicts the loss."""
AS_GOOD_AS_NEW = 4
"""Passes over the data up to which repeated data is worth about as much as new data (arXiv 2305.16264)."""


def loss(value: float) -> str:
    """A loss: "1.2340", or a power of ten for an interval without useful bounds."""
    return f"{value:.4f}" if 1e-3 <= value < 1e3 else significant(value, 2)


def expected(prediction: Prediction, level: float | None = None, show: Callable[[float], str] = loss) -> str:
    """A predicted value with its interval: "1.2340 (95 %: 1.2010…1.2680)"; without `level` where a heading has it."""
    value, low, high = prediction
    if not math.isfinite(low):
        return show(value) if level is None else f"{show(value)} (no interval)"
    named = "" if level is None else f"{level * 100:g} %: "
    return f"{show(value)} ({named}{show(low)}…{show(high) if math.isfinite(high) else '∞'})"


def summary(analysis: Analysis) -> list[str]:
    """The headline and its caveats, as sentences."""
    return [*headline(analysis), *(f"Caveat: {caveat}." for caveat in caveats(analysis))]


def headline(analysis: Analysis) -> list[str]:
    """The predicted loss and rate at ten times the largest size, with and without irreducible loss, as sentences."""
    if analysis.largest is None:
        reason = analysis.refused[PARAMETER_LAWS[0]]
        return [f"These runs determine no law of parameters: {reason}."]
    size = AHEAD * analysis.largest
    line, saturating = (analysis.laws.get(name) for name in PARAMETER_LAWS)
    assert line is not None
    sentences = [
        f"Ten times the largest size ({count(size)} parameters) has a predicted loss of "
        f"{expected(analysis.at_size(size), analysis.level)}, by {line.data}."
    ]
    if change := analysis.change_of_rate(analysis.loss_ratio(size)):
        assert analysis.reference is not None
        sentences.append(
            f"At λ = {analysis.lmbda:g} and equal quality this changes the bitrate of {analysis.reference.model} "
            f"by {expected(change, analysis.level, percent_1)}; one λ is not a BD-rate."
        )
    if saturating is not None:
        with_floor, without = (
            expected(law.predict(size, analysis.level), analysis.level) for law in (saturating, line)
        )
        sentences.append(
            f"With an irreducible loss, E = {loss(saturating.parameters['E'])}, the prediction is {with_floor}, "
            f"without one {without}; {_irreducible(analysis.irreducible_probability.get(saturating.name))}."
        )
    return sentences


def percent_1(share: float) -> str:
    """A signed relative change with one decimal."""
    return percent(share, 1)


def _irreducible(probability: float | None) -> str:
    if probability is None:
        return "three sizes cannot tell which holds"
    verdict = "rejects E = 0" if probability < 0.05 else "cannot tell which holds"
    return f"an F test {verdict} (p = {probability:.2g})"


def caveats(analysis: Analysis) -> list[str]:
    """Reasons to doubt the headline, as sentences without their full stop, the most serious first."""
    if analysis.largest is None:
        return list(analysis.notes)
    line, saturating = (analysis.laws.get(name) for name in PARAMETER_LAWS)
    law = saturating or line
    assert law is not None
    found = [*analysis.notes]
    exponent = law.parameters["alpha"]
    error = (law.standard_errors or {}).get("alpha")
    if exponent <= 0 or law.parameters["A"] == 0:
        found.append("the loss does not fall with parameters")
    elif error is not None and exponent < 2 * error and line is not None and _uncertain(line):
        found.append(f"the exponent, {exponent:.3f}, is less than two standard errors ({error:.3f}) from zero")
    if saturating is None:
        found.append(f"an irreducible loss cannot be fitted: {analysis.refused[PARAMETER_LAWS[1]]}")
    if law.covariance is None:
        found.append("the law has no interval: its trainings do not determine the errors of its parameters")
    found += [*_more_data(analysis, law), *_held_out(analysis, law), *_epochs(analysis)]
    sizes = len({residual.x for residual in analysis.diagnostics[law.name].residuals})
    if sizes < ENOUGH:
        found.append(
            f"there are only {sizes} sizes: with fewer than {ENOUGH}, an irreducible loss can hardly be distinguished "
            "from zero"
        )
    smallest, largest = law.observed["N"]
    if largest < AHEAD * smallest:
        found.append(f"the sizes span a factor of {largest / smallest:.1f}, less than the extrapolation to ten times")
    return list(dict.fromkeys([*found, *law.warnings]))


def _uncertain(line: Law) -> bool:
    """Whether the power law's exponent, too, is less than two standard errors from zero."""
    return line.parameters["alpha"] < 2 * (line.standard_errors or {}).get("alpha", 0.0)


def _more_data(analysis: Analysis, law: Law) -> list[str]:
    """Whether a training with more data than the law's is already below the law's prediction."""
    assert analysis.largest is not None
    ahead = analysis.at_size(AHEAD * analysis.largest).value
    best = min(analysis.observations, key=lambda each: each.loss)
    if best.run in law.runs or best.loss >= ahead:
        return []
    return [
        f"with {count(best.pixels)} pixels, {best.model} reached {loss(best.loss)}, below this law at ten times the "
        "largest size: here data matters more than size, and the irreducible loss may be that of too little data"
    ]


def _held_out(analysis: Analysis, law: Law) -> list[str]:
    missed = [held for held in analysis.diagnostics[law.name].largest if held.inside is False]
    worst = max(missed, key=lambda held: abs(held.error), default=None)
    if worst is None or abs(worst.error) < 1e-4:
        return []
    return [f"fitted without the largest size, the law misses it by {percent(worst.error)}, outside its interval"]


def _epochs(analysis: Analysis) -> list[str]:
    passes = max((each.pixels / each.unique for each in analysis.observations if each.unique), default=0.0)
    if passes <= AS_GOOD_AS_NEW:
        return []
    return [
        f"the runs pass over their data up to {significant(passes, 2)} times: repeated data is worth less than new "
        f"data from about {AS_GOOD_AS_NEW} times on, and a law of repeated data does not hold for more data"
    ]
