"""The analysis of a study: every law, its diagnostics, and reasons for laws that could not be fitted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpcm_scale.errors import UserError
from hpcm_scale.files import write_json, writing
from hpcm_scale.scaling import fit_data
from hpcm_scale.scaling.diagnostics import Diagnostics, Fit, diagnose
from hpcm_scale.scaling.fit_data import FrontierPoint, frontier
from hpcm_scale.scaling.laws.compute_optimal import ComputeOptimal, compute_optimal, fit_cost
from hpcm_scale.scaling.laws.fits import (
    bounded,
    fit_parameters_and_data,
    fit_power_law,
    fit_saturating_power_law,
    irreducible_probability,
)
from hpcm_scale.scaling.laws.law import CannotFit, Law, Points, Prediction, from_plain
from hpcm_scale.scaling.laws.repeated import RepeatedLaw, fit_repeated
from hpcm_scale.scaling.observations import Observation, Study

FORMAT = "hpcm_scale laws 3"
"""Of laws.json."""
FILE_NAME = "laws.json"
PARAMETER_LAWS = ("power_law_of_parameters", "saturating_power_law_of_parameters")
COMPUTE_LAWS = ("power_law_of_compute", "saturating_power_law_of_compute")
PARAMETERS_AND_DATA = "law_of_parameters_and_data"
COMPUTE_OPTIMAL = "compute_optimal"
REPEATED_DATA = "law_of_repeated_data"
TITLES = {
    "power_law_of_parameters": "power law of parameters",
    "saturating_power_law_of_parameters": "saturating power law of parameters",
    "power_law_of_compute": "power law of compute",
    "saturating_power_law_of_compute": "saturating power law of compute",
    PARAMETERS_AND_DATA: "L(N, D)",
    COMPUTE_OPTIMAL: "compute-optimal law",
    REPEATED_DATA: "law of repeated data",
}
"""Names of laws."""
SHORT = {name: title.split(" of ")[0] for name, title in TITLES.items()}
"""Names of laws where an axis or a caption gives the variable."""


@dataclass(frozen=True)
class Reference:
    """The largest size of L(N), means over its trainings."""

    model: str
    parameters: float
    loss: float
    bpp: float


@dataclass(frozen=True)
class Analysis:
    """Results of `hpcm scaling fit`, the contents of laws.json."""

    metric: str
    """One of `observations.METRICS`."""
    lmbda: float
    distortion: str
    """objective.distortion, a key of `observations.LOSSES`."""
    recipe: dict[str, Any]
    """Configuration values that all runs share (`Study.recipe`)."""
    level: float
    """Probability of every interval below."""
    observations: tuple[Observation, ...]
    """By parameters, pixels, seed, run."""
    frontier: tuple[FrontierPoint, ...]
    excluded: tuple[str, ...]
    """Runs and lines that are excluded, one sentence each."""
    laws: dict[str, Law]
    """By name: PARAMETER_LAWS, COMPUTE_LAWS, PARAMETERS_AND_DATA, COMPUTE_OPTIMAL, REPEATED_DATA."""
    refused: dict[str, str]
    """Reason for each law that could not be fitted, by name."""
    irreducible_probability: dict[str, float | None]
    """p value of E = 0 (`laws.fits.irreducible_probability`), by name of the saturating power law."""
    diagnostics: dict[str, Diagnostics]
    """By name of each law except COMPUTE_OPTIMAL and REPEATED_DATA, which rest on the points of L(N, D)."""
    reference: Reference | None
    """None without L(N) or the rate of its largest size."""
    notes: tuple[str, ...]
    """Reasons why the runs may not be comparable."""
    group: str | None
    """Common run.sweep of the runs, wandb's group."""
    project: str | None
    """Common log.project of the runs, wandb's project."""

    @property
    def family(self) -> str:
        """model.family of the runs, or hpcm."""
        return self.recipe.get("model.family", "hpcm")

    @property
    def largest(self) -> float | None:
        """Parameters of the largest size of L(N); None without L(N)."""
        law = self.laws.get(PARAMETER_LAWS[0])
        return law.observed["N"][1] if law else None

    def at_size(self, parameters: float) -> Prediction:
        """Predicted loss of a size by L(N), with the interval of one new training (`laws.fits.bounded`)."""
        return bounded(*self._pair(PARAMETER_LAWS), lambda law: law.predict(parameters, self.level))

    def at_compute(self, pflops: Any) -> Prediction:
        """Predicted loss of a compute budget by L(C), or arrays of the shape of `pflops`."""
        return bounded(*self._pair(COMPUTE_LAWS), lambda law: law.predict(pflops, self.level))

    def loss_ratio(self, parameters: float, start: float | None = None) -> Prediction:
        """Loss of a size relative to that of another, by default the largest one, by L(N)."""
        first = start or self.largest
        assert first is not None
        return bounded(*self._pair(PARAMETER_LAWS), lambda law: law.ratio(first, parameters, self.level))

    def change_of_rate(self, ratio: Prediction) -> Prediction | None:
        """Relative change of the rate at equal quality that a ratio of losses is worth; None without `reference`."""
        if self.reference is None:
            return None
        return Prediction(*(rate_change(each, self.reference.loss, self.reference.bpp) for each in ratio))

    def _pair(self, names: tuple[str, str]) -> tuple[Law, Law | None]:
        return self.laws[names[0]], self.laws.get(names[1])


def rate_change(ratio: float, loss: float, bpp: float) -> float:
    """(L₂/L₁)^(L₁/R₁) − 1: the relative change of the rate R at equal quality, for a ratio of losses at one λ.

    Exact where distortion is D = c·R^−p. At slope −λ, L₁ = λ·D + R₁ has p = R₁/(L₁ − R₁), and a curve whose rates are
    s times as large has the loss L₂ = s^(R₁/L₁)·L₁. For D that falls exponentially with R it is close: −30.8 % for
    −30 %. It holds near one λ and is not a BD-rate.

    Args:
        ratio: L₂/L₁.
        loss: L₁ of the reference model.
        bpp: its rate R₁, bits per pixel.
    """
    return ratio ** (loss / bpp) - 1


def analyse(study: Study, *, level: float = 0.95) -> Analysis:
    """Fit every law that the study determines and compute its diagnostics; deterministic.

    Args:
        study: curves and observations (`observations.study`).
        level: probability of every interval.

    Raises:
        UserError: fewer than two runs, or a level outside 0…1.
    """
    if len(study.observations) < 2:
        raise UserError("too-few-runs", "", "a scaling law needs two runs or more; six sizes are recommended")
    if not 0 < level < 1:
        raise UserError("level-out-of-range", "--level", f"--level {level:g} must be between 0 and 1, such as 0.95")
    points = frontier(study.curves)
    observations = fit_data.ordered(study.observations)
    laws: dict[str, Law] = {}
    refused: dict[str, str] = {}
    diagnostics: dict[str, Diagnostics] = {}

    def fit_to(choose: Callable[[], Points], fits: dict[str, Fit]) -> Points | None:
        try:
            chosen = choose()
        except CannotFit as refusal:
            refused.update(dict.fromkeys(fits, str(refusal)))
            return None
        for name, fit in fits.items():
            try:
                laws[name] = fit(chosen)
            except CannotFit as refusal:  # noqa: PERF203
                refused[name] = str(refusal)
            else:
                diagnostics[name] = diagnose(fit, chosen, laws[name], level=level)
        return chosen

    both = (fit_power_law, fit_saturating_power_law)
    of_parameters = fit_to(lambda: fit_data.of_parameters(observations), dict(zip(PARAMETER_LAWS, both, strict=True)))
    fit_to(lambda: fit_data.of_compute(points), dict(zip(COMPUTE_LAWS, both, strict=True)))
    fit_to(lambda: fit_data.of_parameters_and_data(observations), {PARAMETERS_AND_DATA: fit_parameters_and_data})
    try:
        laws[COMPUTE_OPTIMAL] = _compute_optimal(laws, refused, observations)
    except CannotFit as refusal:
        refused[COMPUTE_OPTIMAL] = str(refusal)
    trained = fit_data.usable(observations)[0]
    if all(each.unique for each in trained):
        try:
            unique = np.array([each.unique for each in trained], np.float64)
            laws[REPEATED_DATA] = fit_repeated(fit_data.of_parameters_and_data(observations), unique)
        except CannotFit as refusal:
            refused[REPEATED_DATA] = str(refusal)
    return Analysis(
        metric=study.metric,
        lmbda=study.lmbda,
        distortion=study.distortion,
        recipe=study.recipe,
        level=level,
        observations=tuple(observations),
        frontier=tuple(points),
        excluded=tuple(study.excluded),
        laws=laws,
        refused=refused,
        irreducible_probability={
            saturating: irreducible_probability(laws[line], laws[saturating])
            for line, saturating in (PARAMETER_LAWS, COMPUTE_LAWS)
            if line in laws and saturating in laws
        },
        diagnostics=diagnostics,
        reference=_reference(of_parameters, observations) if PARAMETER_LAWS[0] in laws else None,
        notes=tuple(study.notes),
        group=study.group,
        project=study.project,
    )


def _compute_optimal(laws: dict[str, Law], refused: dict[str, str], observations: list[Observation]) -> ComputeOptimal:
    if PARAMETERS_AND_DATA not in laws:
        raise CannotFit(f"it needs L(N, D), and {refused[PARAMETERS_AND_DATA]}")
    spent = [each.pflops for each in fit_data.usable(observations)[0]]
    return compute_optimal(laws[PARAMETERS_AND_DATA], fit_cost(*fit_data.costs(observations)), (min(spent), max(spent)))


def _reference(points: Points | None, observations: list[Observation]) -> Reference | None:
    assert points is not None
    size = points.variables["N"].max()
    runs = {run for run, parameters in zip(points.runs, points.variables["N"], strict=True) if parameters == size}
    largest = [each for each in observations if each.run in runs and each.bpp]
    if not largest:
        return None
    loss, bpp = (float(np.mean([getattr(each, name) for each in largest])) for name in ("loss", "bpp"))
    return Reference(largest[0].model, float(size), loss, bpp) if np.isfinite(bpp) else None


def write_laws(analysis: Analysis, path: str | Path) -> None:
    """Write laws.json atomically with full precision, without dates and paths; unknown values are null.

    Raises UserError if it cannot be written.
    """
    with writing(path):
        write_json(path, {"format": FORMAT} | asdict(analysis))


def read_laws(path: str | Path) -> Analysis:
    """Read laws.json, or that of a folder, without loss of precision.

    Raises UserError if it cannot be read or has another format.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError
        analysis = from_plain(Analysis, values)
        kinds = {COMPUTE_OPTIMAL: ComputeOptimal, REPEATED_DATA: RepeatedLaw}
        laws = {name: from_plain(kinds.get(name, Law), law) for name, law in values["laws"].items()}
        if not (TITLES.keys() - {REPEATED_DATA} <= laws.keys() | analysis.refused.keys() and 0 < analysis.level < 1):
            raise ValueError
        return replace(analysis, laws=laws)
    except OSError as error:
        raise UserError(
            "unreadable-laws",
            FILE_NAME,
            f"cannot read {file} ({error.strerror}); run `hpcm scaling fit … --out DIR` first",
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            "laws-of-another-version",
            FILE_NAME,
            f"{file} is not a laws.json of this version; run `hpcm scaling fit` again",
        ) from error


def digest(analysis: Analysis) -> str:
    """SHA-256 of the laws and their points, in hexadecimal: names what a forecast rests on."""
    return hashlib.sha256(json.dumps(asdict(analysis), sort_keys=True).encode()).hexdigest()
