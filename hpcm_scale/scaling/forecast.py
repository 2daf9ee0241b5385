"""Forecasts: the predicted loss of a training, written before it runs and scored after, and BD-rates of a size."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hpcm_scale.config.compose import compose_model, preset_names
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.bd_rate import Comparison, RateCurve, compare
from hpcm_scale.evaluation.points import find_curves
from hpcm_scale.files import write_json, writing
from hpcm_scale.formatting import count, percent, significant
from hpcm_scale.model.ladder import parameters_of, sized
from hpcm_scale.model.parameters import on_meta, parameter_count
from hpcm_scale.scaling.analysis import (
    COMPUTE_LAWS,
    COMPUTE_OPTIMAL,
    PARAMETER_LAWS,
    PARAMETERS_AND_DATA,
    TITLES,
    Analysis,
    digest,
)
from hpcm_scale.scaling.findings import expected, loss
from hpcm_scale.scaling.laws.law import Prediction, from_plain
from hpcm_scale.scaling.observations import Observation, study
from hpcm_scale.scaling.runs import Run

FORMAT = "hpcm_scale forecast 1"
SAME_SIZE, SAME_DATA = 0.03, 0.02
"""Largest relative differences of parameters and of pixels between a forecast and the run that it is scored by."""
FREE = ("schedule.learning_rate", "data.shards", "eval.images")
"""Keys of a recipe that a forecast does not fix: a rate may follow the size, and folders may be moved."""


@dataclass(frozen=True)
class Forecast:
    """A predicted loss of one new training with the recipe of a law."""

    made: str
    """Date and time, ISO 8601, UTC."""
    laws: str
    """SHA-256 of the laws (`analysis.digest`)."""
    law: str
    """Name of the law that was used."""
    metric: str
    lmbda: float
    level: float
    recipe: dict[str, Any]
    parameters: float | None
    pixels: float | None
    """None for a law of parameters alone, whose amount of data is `data`."""
    pflops: float | None
    data: str
    """Description of the law's points."""
    loss: float
    low: float | None
    """Bounds of the prediction interval at `level`; None without one."""
    high: float | None

    @property
    def sentence(self) -> str:
        """The forecast in one sentence."""
        what = [f"{count(self.parameters)} parameters"] if self.parameters else []
        what += [f"{count(self.pixels)} pixels"] if self.pixels else []
        what += [f"{significant(self.pflops)} PFLOPs"] if self.pflops else []
        bounds = Prediction(self.loss, *(math.nan if each is None else each for each in (self.low, self.high)))
        return f"{', '.join(what)}: predicted {self.metric} {expected(bounds, self.level)}, by the {TITLES[self.law]}"


@dataclass(frozen=True)
class Score:
    """How far a forecast was from the run."""

    run: str
    observed: float
    error: float
    """predicted / observed − 1."""
    inside: bool | None
    """Whether the observed loss is inside the interval; None without one."""


def size_of(size: str) -> int:
    """Parameters of a preset, or of a number such as 30m. Raises UserError for neither."""
    if size in preset_names("model"):
        return parameter_count(on_meta(sized(compose_model(size))))
    return parameters_of(size)


def make_forecast(
    analysis: Analysis, *, parameters: float | None = None, images: float | None = None, pflops: float | None = None
) -> Forecast:
    """The predicted loss of a training of a size, on so many images or for so much compute.

    Size and images, or size and compute, take L(N, D); a size alone takes L(N), at the amount of data of its runs;
    compute alone takes the compute-optimal law, or else L(C).

    Raises:
        UserError: the laws determine no such forecast.
    """
    pixels = None
    if parameters and (images or pflops):
        law = analysis.laws.get(PARAMETERS_AND_DATA)
        if law is None:
            raise UserError(
                "no-joint-law-for-forecast",
                "--laws",
                f"there is no L(N, D) ({analysis.refused[PARAMETERS_AND_DATA]}); omit --images and --pflops for a "
                "forecast by the law of parameters, or train more amounts of data",
            )
        if images:
            crop = analysis.recipe.get("data.crop")
            if crop is None:
                raise UserError(
                    "no-common-crop", "--images", "the runs differ in data.crop; give --pflops instead of --images"
                )
            pixels = images * crop**2
        else:
            optimal = analysis.laws[COMPUTE_OPTIMAL].parameters if COMPUTE_OPTIMAL in analysis.laws else None
            if optimal is None or pflops is None:
                raise UserError(
                    "no-cost-for-forecast",
                    "--pflops",
                    f"the cost of a size is not known ({analysis.refused[COMPUTE_OPTIMAL]}); give --images instead",
                )
            pixels = 1e15 * pflops / (optimal["k"] * parameters ** optimal["kappa"])
        predicted = law.predict((parameters, pixels), analysis.level)
    elif parameters:
        if analysis.largest is None:
            raise UserError(
                "no-size-law-for-forecast",
                "--laws",
                f"there is no law of parameters ({analysis.refused[PARAMETER_LAWS[0]]}); train more sizes",
            )
        law = analysis.laws.get(PARAMETER_LAWS[1]) or analysis.laws[PARAMETER_LAWS[0]]
        predicted = analysis.at_size(parameters)
    else:
        assert pflops is not None
        law = (
            analysis.laws.get(COMPUTE_OPTIMAL)
            or analysis.laws.get(COMPUTE_LAWS[1])
            or analysis.laws.get(COMPUTE_LAWS[0])
        )
        if law is None:
            raise UserError(
                "no-compute-law-for-forecast",
                "--laws",
                f"there is no law of compute ({analysis.refused[COMPUTE_LAWS[0]]}); train more sizes",
            )
        predicted = law.predict(pflops, analysis.level) if law.name == COMPUTE_OPTIMAL else analysis.at_compute(pflops)
    low, high = (float(bound) if math.isfinite(bound) else None for bound in predicted[1:])
    return Forecast(
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        laws=digest(analysis),
        law=law.name,
        metric=analysis.metric,
        lmbda=analysis.lmbda,
        level=analysis.level,
        recipe=analysis.recipe,
        parameters=parameters,
        pixels=pixels,
        pflops=pflops,
        data=law.data,
        loss=float(predicted.value),
        low=low,
        high=high,
    )


def write_forecast(forecast: Forecast, path: Path) -> None:
    """Write a forecast as JSON. Raises UserError if the file exists: a forecast is not changed afterwards."""
    if path.exists():
        raise UserError(
            "forecast-exists", "--out", f"{path} exists, and a forecast is not replaced; choose another name"
        )
    with writing(path):
        write_json(path, {"format": FORMAT} | asdict(forecast))


def read_forecast(path: Path) -> Forecast:
    """Read a forecast. Raises UserError if it cannot be read or has another format."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError
        return from_plain(Forecast, values)
    except OSError as error:
        raise UserError(
            "unreadable-forecast", "FORECAST", f"cannot read {path} ({error.strerror}); give a file of `forecast --out`"
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            "forecast-of-another-version", "FORECAST", f"{path} is not a forecast of this version; make it again"
        ) from error


def score(forecast: Forecast, run: Run) -> Score:
    """Compare a forecast with a run.

    Raises:
        UserError: the run is unfinished or not annealed, or has another λ, recipe, size or amount of data.
    """
    found = study([run], forecast.metric, float(run.config["objective"]["lmbda"]))
    (observed,) = found.observations
    _check_same(forecast, observed, found.recipe)
    inside = None
    if forecast.low is not None and forecast.high is not None:
        inside = forecast.low <= observed.loss <= forecast.high
    return Score(run.name, observed.loss, forecast.loss / observed.loss - 1, inside)


def _check_same(forecast: Forecast, observed: Observation, recipe: dict[str, Any]) -> None:
    differences = [("objective.lmbda", forecast.lmbda, observed.lmbda)]
    differences += [(key, value, recipe.get(key)) for key, value in forecast.recipe.items() if key not in FREE]
    for key, expected_value, value in differences:
        if value != expected_value:
            raise UserError(
                "another-recipe",
                key,
                f"{observed.run} has {key}={value}, and the forecast is for {expected_value}; score a run of the same "
                "recipe",
            )
    for name, wanted, value, tolerance in (
        ("parameters", forecast.parameters, observed.parameters, SAME_SIZE),
        ("pixels", forecast.pixels, observed.pixels, SAME_DATA),
        ("PFLOPs", forecast.pflops, observed.pflops, SAME_SIZE),
    ):
        if wanted is not None and abs(value / wanted - 1) > tolerance:
            raise UserError(
                "another-training",
                "RUN",
                f"{observed.run} has {count(value)} {name}, and the forecast is for {count(wanted)}; score the run "
                "that was forecast",
            )
    if not (observed.finished and observed.annealed):
        state = "is not annealed" if observed.finished else "is unfinished"
        raise UserError("unfinished-run", "RUN", f"{observed.run} {state}; score it when it is done")


# BD-rate of a size that was not trained.


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
        shown = expected(bounds, self.level, lambda value: percent(value, 1))
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
            f"the BD-rate of {reference_name} ({percent(reference, 1)}), times the change of rate from {count(start)} "
            f"to {count(parameters)} parameters at λ = {analysis.lmbda:g} ({percent(changes.value, 1)}), taken as that "
            "of every rate"
        )
        low, high = map(_finite, values[1:])
        return RateForecast(anchor.label, values[0], low, high, analysis.level, method)
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


def _moved(analyses: Sequence[Analysis], parameters: float, index: int) -> RateCurve | None:
    """Value, lower or upper bound of the curve of a size; None if a law has no interval."""
    bpp, psnr = [], []
    for analysis in analyses:
        assert analysis.reference is not None
        change = analysis.change_of_rate(analysis.loss_ratio(parameters))
        assert change is not None
        if not math.isfinite(change[index]):
            return None
        quality = [each.psnr for each in analysis.observations if each.parameters == analysis.largest and each.psnr]
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


def describe_score(forecast: Forecast, found: Score) -> str:
    """A score in one sentence."""
    inside = {True: "inside the interval", False: "outside the interval", None: "no interval"}[found.inside]
    return (
        f"{found.run}: observed {loss(found.observed)}, predicted {loss(forecast.loss)} on {forecast.made}, off by "
        f"{percent(found.error)}, {inside}"
    )
