"""What runs tell before any law: a loss curve of each, and where each stands at its end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np

from hpcm_scale.errors import UserError, shown
from hpcm_scale.scaling.filters import (
    EVALUATION,
    TRAINING,
    LeftOut,
    annealed,
    end,
    learning_rates,
    parameters_by_part,
    passed_over,
    smoothed,
    training_pixels,
    trunk,
    usable_lines,
)
from hpcm_scale.scaling.runs import Run

METRICS = re.compile(rf"{EVALUATION}|{TRAINING}|eval_ema_[\d.]+/loss")
"""And of averages of the weights (train.ema) on those images."""
PETA = 1e15


@dataclass(frozen=True, eq=False)
class Curve:
    """One run's loss against compute; arrays are float64 (n,), ascending in compute."""

    run: str
    model: str
    parameters: int
    parts: dict[str, int]
    """Parameters of g_a, g_s, hyper and context; their sum is `parameters`."""
    lmbda: float
    seed: int
    flops_per_pixel: float
    """Of training, forward and backward, as the run's own journal counted it."""
    pflops: np.ndarray
    """Cumulative training compute, 1e15 FLOP; a branch counts its trunk's, too."""
    pixels: np.ndarray
    """Pixels trained on: images × crop², each image with the crop of its time."""
    loss: np.ndarray
    smoothed: np.ndarray
    """Local linear fit of `loss` (`smoothing`)."""
    learning_rate: np.ndarray
    """NaN where the journal does not tell it."""
    annealed: np.ndarray
    """bool (n,): the learning rate has decayed to a tenth of its peak or less (`facts.ANNEALED`)."""
    cooldown_of: str | None = None
    """The trunk, for a branch, which starts at its first decaying step; the two share all before."""


@dataclass(frozen=True)
class Observation:
    """One trained model: where a run stands at its last line of the study's metric."""

    run: str
    model: str
    parameters: int
    parts: dict[str, int]
    lmbda: float
    seed: int
    pixels: float
    images: int
    pflops: float
    flops_per_pixel: float
    loss: float
    """Of an evaluation as it is, of training lines the end of the smoothed curve; `bpp` and `psnr` likewise."""
    bpp: float | None
    psnr: float | None
    annealed: bool
    finished: bool
    cooldown_of: str | None = None


@dataclass(frozen=True)
class Study:
    """What runs tell, before any law; runs in order of parameters, compute and name, whatever order they came in."""

    metric: str
    """One of METRICS."""
    lmbda: float
    curves: list[Curve]
    observations: list[Observation]
    left_out: list[str]
    """One sentence for each run, or lines of a run, that are not in: the run's name and why."""
    notes: list[str] = field(default_factory=list)
    """One sentence for each reason to doubt that the runs can be compared."""
    group: str | None = None
    """The sweep that all runs belong to (run.sweep), wandb's group; None if there is no such one."""
    project: str | None = None
    """wandb's project likewise (log.project)."""
    distortion: str = "mse"
    """What the losses hold beside the rate: a key of `words.LOSSES`."""
    family: str = "hpcm"
    """What the transforms are made of (model.family); of the smallest, where the runs differ."""


def study(runs: Sequence[Run], metric: str | None = None, lmbda: float | None = None) -> Study:
    """The curves and observations that runs give for one λ and one metric, with what was left out and why.

    `metric` is one of METRICS; by default EVALUATION if every run that has begun is evaluated, or is to be, and
    TRAINING otherwise. Takes finished, unfinished, resumed and branched runs. Raises UserError when the runs have
    several λ and none was chosen, or none can be used.
    """
    if metric and not METRICS.fullmatch(metric):
        raise UserError(f"--metric {metric} names no curve; choose {EVALUATION}, {TRAINING} or eval_ema_LENGTH/loss")
    runs = sorted(runs, key=lambda run: (run.name, str(run.folder)))
    begun = [run for run in runs if _lines(run)]
    left_out = [f"{run.name} is left out: it has no line yet" for run in runs if not _lines(run)]
    lmbda = _chosen_lmbda(begun, lmbda)
    metric = metric or (EVALUATION if all(map(_is_evaluated, begun)) else TRAINING)
    told: list[tuple[Curve, Observation]] = []
    special = {run.name: _special(run) for run in begun if run.config["objective"]["lmbda"] == lmbda}
    common = set.intersection(*map(set, special.values())) if special else set()
    for run in begun:
        try:
            if apart := [reason for reason in special.get(run.name, []) if reason not in common]:
                raise LeftOut(apart[0])
            told.append(_tell(run, metric, lmbda, trunk(run, runs)))
            left_out += passed_over(run, metric)
        except LeftOut as reason:  # noqa: PERF203
            left_out.append(f"{run.name} is left out: {reason}")
    if not told:
        raise UserError(f"no run can be used: {'; '.join(left_out) or 'there is none'}")
    told.sort(key=lambda pair: (pair[1].parameters, pair[1].pflops, pair[1].run))
    curves, observations = map(list, zip(*told, strict=True))
    names = {observation.run for observation in observations}
    used = [run for run in begun if run.name in names]
    group, project = _shared(used, "run.sweep"), _shared(used, "log.project")
    notes, distortion = _differences(used, metric), _distortion(used[0])
    family = next(_family(run) for run in used if run.name == observations[0].run)
    return Study(metric, lmbda, curves, observations, sorted(left_out), notes, group, project, distortion, family)


def _special(run: Run) -> list[str]:
    """What sets a run apart from one that trains a codec of one rate for people, by MSE, from nothing."""
    reasons = {
        "it is trained for machine receivers, and its loss is another one": _setting(run, "objective.target")
        == "machine",
        "it is trained for MS-SSIM, and its loss is another one": _distortion(run) == "ms_ssim",
        "it has variable rate: it trains for many λ at once": (_setting(run, "model.rate.levels") or 1) > 1,
        "it started from trained weights, whose compute is not in its journal": _setting(run, "init_from"),
    }
    return [reason for reason, holds in reasons.items() if holds]


def _distortion(run: Run) -> str:
    """What its loss holds beside the rate; runs that do not say it are older than MS-SSIM."""
    return _setting(run, "objective.distortion") or "mse"


def _family(run: Run) -> str:
    """Runs that do not say it are older than families."""
    return _setting(run, "model.family") or "hpcm"


def _lines(run: Run) -> int:
    return sum(run.records.rows(metric).size for metric in (EVALUATION, TRAINING))


def _is_evaluated(run: Run) -> bool:
    return bool(run.records.rows(EVALUATION).size or _setting(run, "eval.images"))


def _chosen_lmbda(runs: Sequence[Run], lmbda: float | None) -> float:
    there = sorted({float(run.config["objective"]["lmbda"]) for run in runs})
    named = ", ".join(f"{value:g}" for value in there)
    if lmbda is None:
        if len(there) > 1:
            raise UserError(f"the runs have several λ ({named}), whose losses do not compare; choose one with --lmbda")
        return there[0] if there else float("nan")
    near = [value for value in there if np.isclose(value, lmbda, rtol=1e-9, atol=0)]
    if not near:
        raise UserError(f"no run has λ = {lmbda:g}; there are runs with {named or 'no line yet'}")
    return near[0]


def _tell(run: Run, metric: str, lmbda: float, cooldown_of: str | None) -> tuple[Curve, Observation]:
    """The curve of a run and where it ends."""
    its_lmbda = float(run.config["objective"]["lmbda"])
    if its_lmbda != lmbda:
        raise LeftOut(f"its λ is {its_lmbda:g}, not {lmbda:g}")
    steps, pflops, images, loss = usable_lines(run, metric)
    try:
        parts = parameters_by_part(run.config)
    except UserError as error:
        raise LeftOut(str(error)) from None
    pixels = training_pixels(run.config, steps, images)
    if pixels is None:
        raise LeftOut("its configuration does not say data.crop")
    rates = learning_rates(run, steps)
    decayed = annealed(run.config, steps, rates)
    fit = smoothed(pflops, loss, rates)
    if not fit.min() > 0:
        raise LeftOut("its loss varies too much to be smoothed")
    same = {
        "run": run.name,
        "model": str(run.config["model"]["name"]),
        "parameters": sum(parts.values()),
        "parts": parts,
        "lmbda": lmbda,
        "seed": int(run.config["train"].get("seed", 0)),
        "flops_per_pixel": float(pflops[-1] * PETA / pixels[-1]),
        "cooldown_of": cooldown_of,
    }
    curve = Curve(
        **same,
        pflops=pflops,
        pixels=pixels,
        loss=loss,
        smoothed=fit,
        learning_rate=rates,
        annealed=decayed,
    )
    observation = Observation(
        **same,
        pixels=float(pixels[-1]),
        images=int(images[-1]),
        pflops=float(pflops[-1]),
        loss=float(fit[-1] if metric == TRAINING else loss[-1]),
        bpp=end(run, metric.replace("loss", "bpp"), steps[-1]),
        psnr=end(run, metric.replace("loss", "psnr"), steps[-1]),
        annealed=bool(decayed[-1]),
        finished=run.finished,
    )
    return curve, observation


def _differences(runs: Sequence[Run], metric: str) -> list[str]:
    """What makes the losses of runs another thing."""
    keys = ("data.crop", "schedule.crops", *(() if metric == TRAINING else ("eval.images", "eval.limit")))
    notes = []
    if len(families := sorted({_family(run) for run in runs})) > 1:
        notes.append(f"the runs are of several families ({', '.join(families)}): each may have laws of its own")
    if changing := [run.name for run in runs if metric == TRAINING and _setting(run, "schedule.crops")]:
        notes.append(
            f"the training crops of {', '.join(changing)} change on the way, and their training loss with them"
        )
    for key in keys:
        values = sorted(
            {shown(PurePath(str(_setting(run, key) or None)).name) for run in runs}
        )  # a path may differ by machine
        if len(values) > 1:
            notes.append(f"the runs differ in {key} ({', '.join(values)}): their losses may not be comparable")
    return notes


def _shared(runs: Sequence[Run], key: str) -> str | None:
    values = {_setting(run, key) for run in runs}
    return values.pop() if len(values) == 1 else None


def _setting(run: Run, key: str) -> Any:
    """A value of the run's configuration; None where it has no such key."""
    value: Any = run.config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
