"""What runs tell about scale: every law they carry, how far to trust it, and what could not be fitted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hpcm_scale.errors import UserError
from hpcm_scale.files import write_json, writing
from hpcm_scale.scaling import fit_data
from hpcm_scale.scaling.breakdown import Breakdown, breakdown
from hpcm_scale.scaling.frontier import FrontierPoint, frontier
from hpcm_scale.scaling.laws.compute_optimal import ComputeOptimal, compute_optimal, fit_cost
from hpcm_scale.scaling.laws.fits import Comparison, compare, fit_floor, fit_joint, fit_power_law
from hpcm_scale.scaling.laws.law import CannotFit, Law, Points, from_plain, to_plain
from hpcm_scale.scaling.observations import Observation, Study
from hpcm_scale.scaling.trust import Fit, Trust, bootstrap, examine
from hpcm_scale.tracking.progress import progress

# From loss to rate: what a lower loss is worth in bits at equal quality.


@dataclass(frozen=True)
class RateGain:
    """Relative change of bitrate that a larger model promises at equal quality."""

    law: str
    """Name of the law it rests on."""
    model: str
    """Name of the reference model."""
    parameters: float
    """Of the reference model."""
    factor: float
    """How many times its parameters."""
    bpp: float
    """Rate of the reference model, bits per pixel."""
    level: float
    """Probability of the interval."""
    change: float
    """ΔR/R; −0.05 is 5 % fewer bits."""
    low: float | None
    """The end of the interval with the larger saving, −1 at least: there is no more to save than all. None where the
    law has no interval."""
    high: float | None

    @property
    def sentence(self) -> str:
        """Like "10× parameters: bitrate −5.0 % (95 %: −7.1…−2.9 %)"; a saving of more than all is told as too much."""
        if self.change <= -1:
            return f"{self.factor:g}× parameters: a loss lower by more than the whole bitrate, too far for first order"
        start = f"{self.factor:g}× parameters: bitrate {_percent(self.change)} %"
        if self.low is None or self.high is None:
            return f"{start} (no interval)"
        return f"{start} ({100 * self.level:g} %: {_percent(self.low)}…{_percent(self.high)} %)"


def rate_change(loss_change: float, bpp: float) -> float:
    """ΔR/R ≈ ΔL/R_bpp, the change of rate at equal quality that a change of L = λ·255²·MSE + R at fixed λ is worth.

    Both models sit where their rate-distortion curve has slope −λ, so the vertical distance of the curves, in bits per
    pixel, is the difference of their losses to first order: ΔL is shared by rate and distortion, and all of it counts
    as rate. ΔL/L would be too small by the part that distortion has of the loss.
    """
    return loss_change / bpp


def rate_gain(law: Law, model: str, parameters: float, bpp: float, factor: float = 10, level: float = 0.95) -> RateGain:
    """The change of bitrate when a law L(N) goes from `parameters` to `factor` times as many (`Law.change`).

    Args:
        law: a law of parameters.
        model: name of the reference model.
        parameters: of the reference model.
        bpp: rate of the reference model, bits per pixel.
        factor: how many times its parameters.
        level: probability that the interval holds one new training.
    """
    change, low, high = law.change(parameters, factor * parameters, level)
    bounds = [None if math.isnan(bound) else max(rate_change(bound, bpp), -1.0) for bound in (low, high)]
    return RateGain(law.name, model, parameters, factor, bpp, level, rate_change(change, bpp), *bounds)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:+.1f}".replace("-", "−")


FORMAT = "hpcm_scale laws 1"
"""Of laws.json."""
FILE_NAME = "laws.json"
PARAMETER_LAWS = ("power_law_of_parameters", "floor_of_parameters")


@dataclass(frozen=True)
class Analysis:
    """All that `hpcm scaling fit` finds; laws.json holds it whole."""

    metric: str
    """One of `observations.METRICS`."""
    lmbda: float
    distortion: str
    """What the losses hold beside the rate: a key of `words.LOSSES`."""
    family: str
    """What the transforms of the models are made of (model.family)."""
    level: float
    """Probability of every interval below."""
    observations: tuple[Observation, ...]
    """In the order of parameters, pixels, seed, run."""
    frontier: tuple[FrontierPoint, ...]
    frontier_annealed: tuple[FrontierPoint, ...]
    left_out: tuple[str, ...]
    """Sentences: run, and why."""
    laws: dict[str, Law]
    """By name: "power_law_of_parameters", "floor_of_parameters"; "power_law_of_compute", "floor_of_compute" (annealed
    frontier); "power_law_of_compute_whole", "floor_of_compute_whole" (whole frontier); "joint", "compute_optimal"."""
    refused: dict[str, str]
    """By name of a law that could not be fitted: why."""
    preferred: dict[str, str]
    """"parameters", "compute" and "compute_whole" to the name of the preferred law (`Comparison.preferred`)."""
    reasons: dict[str, str]
    """For each of `preferred`: a sentence that says why."""
    comparisons: dict[str, Comparison]
    """For each of `preferred`: AICc and F test of the law with a floor against the one without."""
    trust: dict[str, Trust]
    """By name of each law but "compute_optimal", which is as good as "joint"."""
    breakdown: Breakdown | None
    """Loss against the parameters of each part; None without L(N)."""
    rate_gain: RateGain | None
    """What ten times the parameters of the largest size buy by the preferred law; `.sentence` says it. None without
    L(N) or the bpp of that size."""
    rate_gains: dict[str, RateGain]
    """The same by each law of parameters: where they differ, so much depends on the form of the law."""
    warnings: tuple[str, ...]
    """Sentences on the runs; each law has its own beside."""
    group: str | None
    """The sweep that all runs belong to, and wandb's group; None without one."""
    project: str | None
    """wandb's project, likewise."""


def analyse(study: Study, *, bootstrap: int = 0, level: float = 0.95) -> Analysis:
    """Fit every law the study carries and say how far each may be trusted.

    Deterministic: the same study gives the same numbers on the same machine.

    Args:
        study: what `observations.study` read from runs.
        bootstrap: resamples of the trainings for bootstrap intervals; 0 leaves them out.
        level: probability of every interval.

    Raises:
        UserError: fewer than two runs, or a level outside 0…1. Whatever else cannot be fitted is in `refused`.
    """
    if len(study.observations) < 2:
        raise UserError("one run tells nothing about scale; name two at least, better six sizes")
    if not 0 < level < 1:
        raise UserError(f"an interval cannot hold with probability {level:g}; choose one between 0 and 1, such as 0.95")
    whole, annealed = frontier(study.curves), frontier(study.curves, annealed_only=True)
    observations = fit_data.ordered(study.observations)
    fitting = _Fitting(bootstrap, level)
    of_parameters = fitting.pair("parameters", lambda: fit_data.of_parameters(observations))
    fitting.pair("compute", lambda: fit_data.of_compute(annealed, whole=False))
    fitting.pair("compute_whole", lambda: fit_data.of_compute(whole, whole=True))
    fitting.add("joint", fit_joint, fit_data.of_both(observations))
    fitting.add_compute_optimal(observations)
    comparisons = fitting.comparisons()
    gains = _rate_gains(fitting.laws, of_parameters, observations, level)
    return Analysis(
        metric=study.metric,
        lmbda=study.lmbda,
        distortion=study.distortion,
        family=study.family,
        level=level,
        observations=tuple(observations),
        frontier=tuple(whole),
        frontier_annealed=tuple(annealed),
        left_out=tuple(study.left_out),
        laws=fitting.laws,
        refused=fitting.refused,
        preferred={of: each.preferred for of, each in comparisons.items()},
        reasons={of: each.reason for of, each in comparisons.items()},
        comparisons=comparisons,
        trust=fitting.trust,
        breakdown=breakdown(of_parameters, observations) if of_parameters else None,
        rate_gain=gains[comparisons["parameters"].preferred] if gains else None,
        rate_gains=gains,
        warnings=tuple(study.notes),
        group=study.group,
        project=study.project,
    )


class _Fitting:
    """Fits one law after the other and keeps what came of it."""

    def __init__(self, resamples: int, level: float) -> None:
        self.resamples, self.level = resamples, level
        self.laws: dict[str, Law] = {}
        self.refused: dict[str, str] = {}
        self.trust: dict[str, Trust] = {}

    def pair(self, of: str, choose: Callable[[], Points]) -> Points | None:
        """A power law without and with a floor through the same points, which are returned if there are any."""
        names = f"power_law_of_{of}", f"floor_of_{of}"
        try:
            points = choose()
        except CannotFit as refusal:
            self.refused |= dict.fromkeys(names, str(refusal))
            return None
        for name, fit in zip(names, (fit_power_law, fit_floor), strict=True):
            self.add(name, fit, points)
        return points if names[0] in self.laws else None

    def add(self, name: str, fit: Fit, points: Points) -> None:
        """One law of these points, with what can be said for and against it."""
        try:
            law = fit(points)
        except CannotFit as refusal:
            self.refused[name] = str(refusal)
            return
        trust = examine(fit, points, law, level=self.level)
        if self.resamples:
            with progress(total=self.resamples, description=f"bootstrap of {name}", unit="fit") as bar:
                try:
                    found = bootstrap(fit, points, self.resamples, level=self.level, advance=bar.update)
                    trust = replace(trust, bootstrap=found)
                except CannotFit as refusal:
                    trust = replace(trust, bootstrap_refused=str(refusal))
        self.laws[name], self.trust[name] = law, trust

    def add_compute_optimal(self, observations: list[Observation]) -> None:
        """The compute-optimal law, if there is a joint one."""
        if "joint" not in self.laws:
            self.refused["compute_optimal"] = f"it rests on the joint law, and {self.refused['joint']}"
            return
        spent = [each.pflops for each in fit_data.trained(observations)[0]]
        try:
            cost = fit_cost(*fit_data.costs(observations))
            self.laws["compute_optimal"] = compute_optimal(self.laws["joint"], cost, (min(spent), max(spent)))
        except CannotFit as refusal:
            self.refused["compute_optimal"] = str(refusal)

    def comparisons(self) -> dict[str, Comparison]:
        """Of each pair which law is preferred, and why."""
        found = {}
        for of in ("parameters", "compute", "compute_whole"):
            alone, with_floor = (self.laws.get(f"{kind}_of_{of}") for kind in ("power_law", "floor"))
            if alone is not None:
                found[of] = compare(alone, with_floor)
        return found


def _rate_gains(
    laws: dict[str, Law], points: Points | None, observations: list[Observation], level: float
) -> dict[str, RateGain]:
    """By law of parameters, from the largest size of L(N) on, whose rate is the mean of its trainings there."""
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
    """Write laws.json atomically: full precision, no date and no path of this machine; null where nothing is known.

    Raises UserError if it cannot be written.
    """
    with writing(path):
        write_json(path, {"format": FORMAT} | to_plain(analysis))


def read_laws(path: str | Path) -> Analysis:
    """What `write_laws` wrote, equal to the last digit; `path` is laws.json or its folder.

    Raises UserError if it cannot be read or is no laws.json of this version.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError
        older = {"distortion": "mse", "family": "hpcm"}  # there was nothing else to name
        analysis = from_plain(Analysis, older | values)
        # Laws differ in how they predict, and "compute_optimal" alone has a class of its own.
        kinds = {"compute_optimal": ComputeOptimal}
        laws = {name: from_plain(kinds.get(name, Law), law) for name, law in values["laws"].items()}
        return replace(analysis, laws=laws)
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); `hpcm scaling fit … --out DIR` writes one") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is no laws.json of this version; run `hpcm scaling fit` again") from error
