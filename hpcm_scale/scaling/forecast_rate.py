"""Predicted BD-rates of a size that was not trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.bd_rate import Comparison, RateCurve, compare
from hpcm_scale.evaluation.points import find_curves
from hpcm_scale.formatting import count
from hpcm_scale.scaling.analysis import PARAMETER_LAWS, Analysis
from hpcm_scale.scaling.findings import expected, percent_1
from hpcm_scale.scaling.forecast import FREE
from hpcm_scale.scaling.laws.law import Prediction


@dataclass(frozen=True)
class RateForecast:
    """A predicted BD-rate, percent of the anchor's bits."""

    anchor: str
    value: float
    low: float | None
    high: float | None
    level: float
    method: str
    """What it rests on, one sentence."""

    @property
    def sentence(self) -> str:
        """The prediction in two sentences."""
        bounds = Prediction(*(math.nan if each is None else each / 100 for each in (self.value, self.low, self.high)))
        shown = expected(bounds, self.level, percent_1)
        return f"Predicted BD-rate against {self.anchor}: {shown}. It is {self.method}."


def forecast_bd_rate(
    analyses: Sequence[Analysis],
    parameters: float,
    anchor_name: str,
    reference_name: str | None = None,
    reference_size: float | None = None,
) -> RateForecast:
    """The predicted BD-rate of a size against an anchor.

    With laws at several λ, the largest size of each gives a point (bpp, PSNR), whose rate is multiplied by the law's
    change of rate at that λ; the BD-rate of the moved points follows. With one λ, the change of rate at that λ is
    multiplied onto the BD-rate of a reference curve: (1 + BD)·(L₂/L₁)^(L₁/R₁) − 1.

    Args:
        analyses: laws of the same runs at one λ each.
        parameters: of the size.
        anchor_name: an anchor of `hpcm bd-rate`.
        reference_name: with one λ, an evaluation or a shipped curve of a trained model.
        reference_size: its parameters; by default those of the largest size of the law.

    Raises:
        UserError: no law, no rate, or curves without a BD-rate.
    """
    anchor = _one_curve(anchor_name, "--anchor")
    for analysis in analyses:
        if analysis.reference is None:
            raise UserError(
                "no-rate-for-forecast",
                "--laws",
                f"the laws at λ = {analysis.lmbda:g} have no law of parameters with the rate of its largest size; fit "
                "runs with evaluations",
            )
    if len(analyses) == 1:
        (analysis,) = analyses
        if reference_name is None:
            raise UserError(
                "no-reference",
                "--reference",
                "laws at one λ need --reference, the evaluation of a trained size; or give --laws of three λ or more",
            )
        start = reference_size or analysis.largest
        assert start is not None
        reference = compare(_one_curve(reference_name, "--reference"), anchor).bd_rate / 100
        changes = analysis.change_of_rate(analysis.loss_ratio(parameters, start))
        assert changes is not None
        values = [100 * ((1 + reference) * (1 + change) - 1) for change in changes]
        method = (
            f"the BD-rate of {reference_name} ({percent_1(reference)}), times the change of rate from {count(start)} "
            f"to {count(parameters)} parameters at λ = {analysis.lmbda:g} ({percent_1(changes.value)}), taken as that "
            "of every rate"
        )
        low, high = map(_finite, values[1:])
        return RateForecast(anchor.label, values[0], low, high, analysis.level, method)
    if reference_name is not None or reference_size is not None:
        raise UserError(
            "reference-with-several-laws",
            "--reference",
            "laws at several λ move the points of their largest size; omit --reference and --reference-size",
        )
    _check_comparable(analyses)
    moved = [_moved(analyses, parameters, index) for index in range(3)]
    found: list[Comparison | None] = [compare(curve, anchor) if curve else None for curve in moved]
    assert found[0] is not None
    low, high = (each.bd_rate if each else None for each in found[1:])
    lambdas = ", ".join(f"{analysis.lmbda:g}" for analysis in analyses)
    return RateForecast(
        anchor.label,
        found[0].bd_rate,
        low,
        high,
        analyses[0].level,
        f"that of the largest trained size at λ = {lambdas}, each point moved by the law at its λ",
    )


def _check_comparable(analyses: Sequence[Analysis]) -> None:
    """Raise UserError unless the laws are of different λ, and of the same runs otherwise."""
    first, *others = analyses
    lambdas = sorted(analysis.lmbda for analysis in analyses)
    if len(set(lambdas)) < max(3, len(lambdas)):
        shown = ", ".join(f"{lmbda:g}" for lmbda in lambdas)
        raise UserError(
            "too-few-lambdas", "--laws", f"a BD-rate needs laws at one λ or at three or more, each once, not at {shown}"
        )

    def same(analysis: Analysis) -> dict[str, Any]:
        recipe = {key: value for key, value in analysis.recipe.items() if key not in FREE}
        plain = {key: getattr(analysis, key) for key in ("metric", "distortion", "level", "largest")}
        return recipe | plain

    for other in others:
        mine, its = same(first), same(other)
        if differing := sorted(key for key in mine | its if mine.get(key) != its.get(key)):
            raise UserError(
                "laws-of-several-recipes",
                "--laws",
                f"the laws at λ = {first.lmbda:g} and {other.lmbda:g} differ in {', '.join(differing)}; give laws of "
                "runs that differ in λ alone",
            )


def _moved(analyses: Sequence[Analysis], parameters: float, index: int) -> RateCurve | None:
    """Value, lower or upper bound of the curve of a size; None if a law has no interval."""
    bpp, psnr = [], []
    for analysis in analyses:
        assert analysis.reference is not None
        change = analysis.change_of_rate(analysis.loss_ratio(parameters))
        assert change is not None
        if not math.isfinite(change[index]):
            return None
        runs = analysis.laws[PARAMETER_LAWS[0]].runs
        largest = [each for each in analysis.observations if each.run in runs and each.parameters == analysis.largest]
        quality = [each.psnr for each in largest if each.psnr is not None]
        if not quality:
            raise UserError(
                "no-quality-for-forecast",
                "--laws",
                f"the runs of the laws at λ = {analysis.lmbda:g} have no PSNR; fit runs with evaluations",
            )
        bpp.append(analysis.reference.bpp * (1 + change[index]))
        psnr.append(sum(quality) / len(quality))
    name = f"{count(parameters)} parameters"
    return RateCurve(name, name, "forecast", "estimated", tuple(bpp), tuple(psnr))


def _one_curve(name: str, option: str) -> RateCurve:
    curves = find_curves(name)
    if len(curves) != 1:
        raise UserError("several-curves", option, f"{name} has {len(curves)} curves; give a result with one")
    return curves[0]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
