"""The analysis of a study: every law, its diagnostics, and reasons for laws that could not be fitted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from hpcm_scale.errors import UserError
from hpcm_scale.files import write_json, writing
from hpcm_scale.formatting import percent
from hpcm_scale.scaling import fit_data
from hpcm_scale.scaling.diagnostics import Diagnostics, Fit, bootstrap, diagnose
from hpcm_scale.scaling.fit_data import FrontierPoint, frontier
from hpcm_scale.scaling.laws.compute_optimal import ComputeOptimal, compute_optimal, fit_cost
from hpcm_scale.scaling.laws.fits import (
    Comparison,
    compare,
    fit_parameters_and_data,
    fit_power_law,
    fit_saturating_power_law,
)
from hpcm_scale.scaling.laws.law import CannotFit, Law, Points, from_plain
from hpcm_scale.scaling.observations import Observation, Study
from hpcm_scale.tracking.progress import progress

# From loss to rate: the change of bitrate at equal quality that a lower loss is worth.


@dataclass(frozen=True)
class RateGain:
    """Predicted relative change of bitrate at equal quality with `factor` times the parameters."""

    law: str
    """Name of the law it rests on."""
    model: str
    """Name of the reference model."""
    parameters: float
    """Of the reference model."""
    factor: float
    bpp: float
    """Rate of the reference model, bits per pixel."""
    level: float
    """Probability of the interval."""
    change: float
    """ΔR/R; −0.05 is 5 % fewer bits."""
    low: float | None
    """Lower bound of the interval, at least −1; None if the law has no interval."""
    high: float | None

    @property
    def sentence(self) -> str:
        """Such as "10× parameters: bitrate −5.0 % (95 %: −7.1 %…−2.9 %)"; a saving over 100 % is called invalid."""
        if self.change <= -1:
            return f"{self.factor:g}× parameters: the predicted saving exceeds the bitrate, first order is not valid"
        start = f"{self.factor:g}× parameters: bitrate {percent(self.change, 1)}"
        if self.low is None or self.high is None:
            return f"{start} (no interval)"
        return f"{start} ({100 * self.level:g} %: {percent(self.low, 1)}…{percent(self.high, 1)})"


def rate_change(loss_change: float, bpp: float) -> float:
    """ΔR/R ≈ ΔL/R at equal quality for a change ΔL of L = λ·255²·MSE + R at fixed λ, to first order.

    Both models are at slope −λ of their rate-distortion curves, so the vertical distance of the curves, in bits per
    pixel, equals the difference of the losses. ΔL/L would be too small by the distortion's share of the loss.
    """
    return loss_change / bpp


def rate_gain(law: Law, model: str, parameters: float, bpp: float, factor: float = 10, level: float = 0.95) -> RateGain:
    """The change of bitrate by a law L(N) from `parameters` to `factor` times as many (`Law.change`).

    Args:
        law: a law of parameters.
        model: name of the reference model.
        parameters: of the reference model.
        bpp: rate of the reference model, bits per pixel.
        factor: multiple of its parameters.
        level: probability of the prediction interval of one new training.
    """
    change, low, high = law.change(parameters, factor * parameters, level)
    bounds = [None if math.isnan(bound) else max(rate_change(bound, bpp), -1.0) for bound in (low, high)]
    return RateGain(law.name, model, parameters, factor, bpp, level, rate_change(change, bpp), *bounds)


FORMAT = "hpcm_scale laws 2"
"""Of laws.json."""
FILE_NAME = "laws.json"
PARAMETER_LAWS = ("power_law_of_parameters", "saturating_power_law_of_parameters")
PARAMETERS_AND_DATA = "law_of_parameters_and_data"


@dataclass(frozen=True)
class Analysis:
    """Results of `hpcm scaling fit`, the contents of laws.json."""

    metric: str
    """One of `observations.METRICS`."""
    lmbda: float
    distortion: str
    """objective.distortion, a key of `observations.LOSSES`."""
    family: str
    """model.family."""
    level: float
    """Probability of every interval below."""
    observations: tuple[Observation, ...]
    """By parameters, pixels, seed, run."""
    frontier: tuple[FrontierPoint, ...]
    frontier_annealed: tuple[FrontierPoint, ...]
    excluded: tuple[str, ...]
    """Runs and lines that are excluded, one sentence each."""
    laws: dict[str, Law]
    """By name: PARAMETER_LAWS, the same of "compute" (annealed frontier) and of "compute_whole" (whole frontier),
    PARAMETERS_AND_DATA, "compute_optimal"."""
    refused: dict[str, str]
    """Reason for each law that could not be fitted, by name."""
    comparisons: dict[str, Comparison]
    """Power law against saturating power law of "parameters", "compute" and "compute_whole"."""
    diagnostics: dict[str, Diagnostics]
    """By name of each law except "compute_optimal", whose diagnostics are those of L(N, D)."""
    rate_gains: dict[str, RateGain]
    """Ten times the parameters of the largest size by each law of parameters; empty without L(N) or its bpp."""
    warnings: tuple[str, ...]
    """Caveats on the runs; each law has its own."""
    group: str | None
    """Common run.sweep of the runs, wandb's group."""
    project: str | None
    """Common log.project of the runs, wandb's project."""

    @property
    def preferred(self) -> dict[str, str]:
        """Name of the preferred law of "parameters", "compute" and "compute_whole", as far as there is one."""
        return {of: comparison.preferred for of, comparison in self.comparisons.items()}

    @property
    def rate_gain(self) -> RateGain | None:
        """The rate gain by the preferred law of parameters."""
        return self.rate_gains.get(self.preferred.get("parameters", ""))


def analyse(study: Study, *, bootstrap: int = 0, level: float = 0.95) -> Analysis:
    """Fit every law that the study determines and compute its diagnostics; deterministic.

    Args:
        study: curves and observations (`observations.study`).
        bootstrap: resamples for bootstrap intervals; 0 for none.
        level: probability of every interval.

    Raises:
        UserError: fewer than two runs, or a level outside 0…1.
    """
    if len(study.observations) < 2:
        raise UserError("too-few-runs", "", "a scaling law needs two runs or more; six sizes are recommended")
    if not 0 < level < 1:
        raise UserError("level-out-of-range", "--level", f"--level {level:g} must be between 0 and 1, such as 0.95")
    whole, annealed = frontier(study.curves), frontier(study.curves, annealed_only=True)
    observations = fit_data.ordered(study.observations)
    fitting = _Fitting(bootstrap, level)
    of_parameters = fitting.pair("parameters", lambda: fit_data.of_parameters(observations))
    fitting.pair("compute", lambda: fit_data.of_compute(annealed, whole=False))
    fitting.pair("compute_whole", lambda: fit_data.of_compute(whole, whole=True))
    fitting.add(PARAMETERS_AND_DATA, fit_parameters_and_data, fit_data.of_parameters_and_data(observations))
    fitting.add_compute_optimal(observations)
    return Analysis(
        metric=study.metric,
        lmbda=study.lmbda,
        distortion=study.distortion,
        family=study.family,
        level=level,
        observations=tuple(observations),
        frontier=tuple(whole),
        frontier_annealed=tuple(annealed),
        excluded=tuple(study.excluded),
        laws=fitting.laws,
        refused=fitting.refused,
        comparisons=fitting.comparisons,
        diagnostics=fitting.diagnostics,
        rate_gains=_rate_gains(fitting.laws, of_parameters, observations, level),
        warnings=tuple(study.notes),
        group=study.group,
        project=study.project,
    )


class _Fitting:
    """Laws fitted so far, with diagnostics, comparisons and refusals."""

    def __init__(self, resamples: int, level: float) -> None:
        self.resamples, self.level = resamples, level
        self.laws: dict[str, Law] = {}
        self.refused: dict[str, str] = {}
        self.diagnostics: dict[str, Diagnostics] = {}
        self.comparisons: dict[str, Comparison] = {}

    def pair(self, of: str, choose: Callable[[], Points]) -> Points | None:
        """Fit and compare both power laws of the same points; returns the points if there is a law."""
        names = f"power_law_of_{of}", f"saturating_power_law_of_{of}"
        try:
            points = choose()
        except CannotFit as refusal:
            self.refused |= dict.fromkeys(names, str(refusal))
            return None
        for name, fit in zip(names, (fit_power_law, fit_saturating_power_law), strict=True):
            self.add(name, fit, points)
        if names[0] not in self.laws:
            return None
        self.comparisons[of] = compare(self.laws[names[0]], self.laws.get(names[1]))
        return points

    def add(self, name: str, fit: Fit, points: Points) -> None:
        """Fit one law."""
        try:
            law = fit(points)
        except CannotFit as refusal:
            self.refused[name] = str(refusal)
            return
        diagnostics = diagnose(fit, points, law, level=self.level)
        if self.resamples:
            with progress(total=self.resamples, description=f"bootstrap of {name}", unit="fit") as bar:
                try:
                    found = bootstrap(fit, points, self.resamples, level=self.level, advance=bar.update)
                    diagnostics = replace(diagnostics, bootstrap=found)
                except CannotFit as refusal:
                    diagnostics = replace(diagnostics, bootstrap_refused=str(refusal))
        self.laws[name], self.diagnostics[name] = law, diagnostics

    def add_compute_optimal(self, observations: list[Observation]) -> None:
        """The compute-optimal law, if there is L(N, D)."""
        if PARAMETERS_AND_DATA not in self.laws:
            self.refused["compute_optimal"] = f"it needs L(N, D), and {self.refused[PARAMETERS_AND_DATA]}"
            return
        spent = [each.pflops for each in fit_data.usable(observations)[0]]
        try:
            cost = fit_cost(*fit_data.costs(observations))
            law = compute_optimal(self.laws[PARAMETERS_AND_DATA], cost, (min(spent), max(spent)))
            self.laws["compute_optimal"] = law
        except CannotFit as refusal:
            self.refused["compute_optimal"] = str(refusal)


def _rate_gains(
    laws: dict[str, Law], points: Points | None, observations: list[Observation], level: float
) -> dict[str, RateGain]:
    """Gains over the largest size of L(N), whose rate is the mean of its trainings there."""
    if points is None:
        return {}
    size = points.variables["N"].max()
    runs = {run for run, parameters in zip(points.runs, points.variables["N"], strict=True) if parameters == size}
    largest = [each for each in observations if each.run in runs]
    rates = [each.bpp for each in largest if each.bpp]
    if not rates:
        return {}
    reference = largest[0].model, float(size), float(np.mean(rates))
    return {name: rate_gain(laws[name], *reference, level=level) for name in PARAMETER_LAWS if name in laws}


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
        kinds = {"compute_optimal": ComputeOptimal}
        laws = {name: from_plain(kinds.get(name, Law), law) for name, law in values["laws"].items()}
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
