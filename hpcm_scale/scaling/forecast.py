"""Forecasts: the predicted loss of a training, written before it runs and scored after."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hpcm_scale.config.compose import compose_model, preset_names
from hpcm_scale.errors import UserError
from hpcm_scale.files import write_json, writing
from hpcm_scale.formatting import count, percent, significant
from hpcm_scale.model.ladder import count_parameters, parameters_of
from hpcm_scale.scaling.analysis import (
    COMPUTE_LAWS,
    COMPUTE_OPTIMAL,
    PARAMETER_LAWS,
    PARAMETERS_AND_DATA,
    TITLES,
    Analysis,
    digest,
)
from hpcm_scale.scaling.findings import AHEAD, caveats, expected, loss
from hpcm_scale.scaling.laws.law import Prediction, from_plain
from hpcm_scale.scaling.observations import Observation, study
from hpcm_scale.scaling.runs import Run

FORMAT = "hpcm_scale forecast 1"
SAME_SIZE, SAME_DATA = 0.03, 0.02
"""Largest relative differences of parameters and of pixels between a forecast and the run that it is scored by."""
UNITS = ("parameters", "pixels", "PFLOPs")
"""Of N, D and C."""
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
    """None for a budget alone, and for a law of parameters whose trainings had different amounts of data."""
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
        law = TITLES[self.law] if self.law == PARAMETERS_AND_DATA else f"the {TITLES[self.law]}"
        return f"{', '.join(what)}: predicted {self.metric} {expected(bounds, self.level)}, by {law}"


@dataclass(frozen=True)
class Score:
    """How far a forecast was from the run."""

    run: str
    observed: float
    error: float
    """predicted / observed − 1."""
    inside: bool | None
    """Whether the observed loss is inside the interval; None without one."""


def size_of(size: str, option: str = "--size") -> int:
    """Parameters of a preset, or of a number such as 30m. Raises UserError for neither."""
    if size in preset_names("model"):
        return count_parameters(compose_model(size))
    try:
        return parameters_of(size)
    except UserError as error:
        sentence = str(error).replace("model.size=", f"{option} ", 1)
        raise UserError(error.code, option, sentence) from None


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
        amounts = [each.pixels for each in analysis.observations if each.run in law.runs]
        if amounts and max(amounts) <= (1 + SAME_DATA) * min(amounts):
            pixels = max(amounts)
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
        recipe=analysis.recipe | {"objective.distortion": analysis.distortion},
        parameters=parameters,
        pixels=pixels,
        pflops=pflops,
        data=law.data,
        loss=float(predicted.value),
        low=low,
        high=high,
    )


def doubts(analysis: Analysis, forecast: Forecast) -> list[str]:
    """Caveats of the law of a forecast, and how far it is from the trainings, as sentences without full stop."""
    law = analysis.laws[forecast.law]
    found = caveats(analysis) if forecast.law in PARAMETER_LAWS else [*analysis.notes, *law.warnings]
    for name, unit, value in zip("NDC", UNITS, (forecast.parameters, forecast.pixels, forecast.pflops), strict=True):
        if value is None or name not in law.observed:
            continue
        low, high = law.observed[name]
        amount = f"{significant(value) if name == 'C' else count(value)} {unit}"
        if value > AHEAD * high:
            found.append(f"{amount} are {significant(value / high, 2)} times the largest of the trainings")
        if value < low / AHEAD:
            found.append(f"{amount} are 1/{significant(low / value, 2)} of the smallest of the trainings")
    return found


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
        forecast = from_plain(Forecast, values)
        bounds = [each for each in (forecast.low, forecast.loss, forecast.high) if each is not None]
        amounts = (forecast.loss, forecast.parameters, forecast.pixels, forecast.pflops)
        if bounds != sorted(bounds) or not all(0 < each < math.inf for each in amounts if each is not None):
            raise ValueError
        return forecast
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
    _check_same(forecast, observed, found.recipe | {"objective.distortion": found.distortion})
    inside = None
    if forecast.low is not None and forecast.high is not None:
        inside = forecast.low <= observed.loss <= forecast.high
    return Score(run.name, observed.loss, forecast.loss / observed.loss - 1, inside)


def _check_same(forecast: Forecast, observed: Observation, recipe: dict[str, Any]) -> None:
    if not (observed.finished and observed.annealed):
        state = "is not annealed" if observed.finished else "is unfinished"
        raise UserError("unfinished-run", "RUN", f"{observed.run} {state}; score a run whose learning rate has decayed")
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
    for name, wanted, value, tolerance in zip(
        UNITS,
        (forecast.parameters, forecast.pixels, forecast.pflops),
        (observed.parameters, observed.pixels, observed.pflops),
        (SAME_SIZE, SAME_DATA, SAME_SIZE),
        strict=True,
    ):
        if wanted is not None and abs(value / wanted - 1) > tolerance:
            raise UserError(
                "another-training",
                "RUN",
                f"{observed.run} has {count(value)} {name}, and the forecast is for {count(wanted)}; score the run "
                "that was forecast",
            )


def describe_score(forecast: Forecast, found: Score) -> str:
    """A score in one sentence."""
    inside = {True: "inside the interval", False: "outside the interval", None: "no interval"}[found.inside]
    return (
        f"{found.run}: observed {loss(found.observed)}, predicted {loss(forecast.loss)} on {forecast.made}, off by "
        f"{percent(found.error)}, {inside}"
    )
