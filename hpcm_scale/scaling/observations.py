"""Loss curves and end points of runs, before any law is fitted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

import numpy as np

from hpcm_scale.errors import UserError, printable
from hpcm_scale.scaling.filters import (
    EVALUATION,
    TRAINING,
    Excluded,
    annealed,
    cooldown_parent,
    end,
    excluded_lines,
    learning_rates,
    parameters_of,
    smoothed,
    training_pixels,
    usable_lines,
)
from hpcm_scale.scaling.runs import Run

METRICS = re.compile(rf"{EVALUATION}|{TRAINING}|eval_ema_[\d.]+/loss")
"""The last one is that of averaged weights (train.ema)."""
LOSSES = {"mse": "λ·255²·MSE + bpp", "ms_ssim": "λ·(1 − MS-SSIM) + bpp"}
"""Formula of the loss by objective.distortion."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Loss of one run against compute; arrays are float64 (n,), ascending in compute."""

    run: str
    model: str
    parameters: int
    pflops: np.ndarray
    """Cumulative training compute, 1e15 FLOP; a cooldown includes that of its constant-rate run."""
    pixels: np.ndarray
    """Cumulative training pixels: images × crop², with the crop at the time."""
    loss: np.ndarray
    smoothed: np.ndarray
    """Local linear fit of `loss` (`filters.smoothed`)."""
    learning_rate: np.ndarray
    """NaN where the journal has none."""
    annealed: np.ndarray
    """bool (n,): whether the learning rate has decayed (`filters.annealed`)."""


@dataclass(frozen=True)
class Observation:
    """One trained model: a run at its last line with the study's metric."""

    run: str
    model: str
    parameters: int
    lmbda: float
    seed: int
    pixels: float
    images: int
    pflops: float
    flops_per_pixel: float
    """Training FLOP per pixel, forward and backward, from the run's journal."""
    loss: float
    """An evaluation's own value, or the end of the smoothed training curve; `bpp` and `psnr` likewise."""
    bpp: float | None
    psnr: float | None
    annealed: bool
    finished: bool
    cooldown_of: str | None = None
    """Constant-rate run that a cooldown starts from."""


@dataclass(frozen=True)
class Study:
    """Comparable runs, ordered by parameters, compute and name."""

    metric: str
    """One of METRICS."""
    lmbda: float
    curves: list[Curve]
    observations: list[Observation]
    excluded: list[str]
    """One sentence for each run, or kind of line of a run, that is excluded."""
    notes: list[str] = field(default_factory=list)
    """Reasons why the runs may not be comparable, one sentence each."""
    group: str | None = None
    """Common run.sweep of the runs, wandb's group; None if they differ."""
    project: str | None = None
    """Common log.project of the runs, wandb's project."""
    distortion: str = "mse"
    """objective.distortion, a key of `LOSSES`."""
    family: str = "hpcm"
    """model.family of the smallest run."""


def study(runs: Sequence[Run], metric: str | None = None, lmbda: float | None = None) -> Study:
    """Curves and observations of `runs` for one λ and one metric.

    Args:
        runs: finished, unfinished, resumed runs and cooldowns, in any order.
        metric: one of METRICS; by default EVALUATION if every run has evaluations or eval.images, else TRAINING.
        lmbda: λ of the runs to use.

    Raises:
        UserError: the runs have several λ and `lmbda` is None, or no run is usable.
    """
    if metric and not METRICS.fullmatch(metric):
        raise UserError(
            "unknown-loss",
            "--metric",
            f"--metric {metric} is not a loss; choose {EVALUATION}, {TRAINING} or eval_ema_LENGTH/loss",
        )
    runs = sorted(runs, key=lambda run: (run.name, str(run.folder)))
    begun = [run for run in runs if _lines(run)]
    excluded = [f"{run.name} is excluded: it has no line yet" for run in runs if not _lines(run)]
    lmbda = _chosen_lmbda(begun, lmbda)
    metric = metric or (EVALUATION if all(map(_is_evaluated, begun)) else TRAINING)
    pairs: list[tuple[Curve, Observation]] = []
    special = {run.name: _special(run) for run in begun if run.config["objective"]["lmbda"] == lmbda}
    common = set.intersection(*map(set, special.values())) if special else set()
    for run in begun:
        try:
            if reasons := [reason for reason in special.get(run.name, []) if reason not in common]:
                raise Excluded(reasons[0])
            pairs.append(_observe(run, metric, lmbda, cooldown_parent(run, runs)))
            excluded += excluded_lines(run, metric)
        except Excluded as reason:  # noqa: PERF203
            excluded.append(f"{run.name} is excluded: {reason}")
    if not pairs:
        causes = "; ".join(excluded) or "there is none"
        raise UserError("no-usable-runs", "", f"no run is usable ({causes}); correct these causes or give other runs")
    pairs.sort(key=lambda pair: (pair[1].parameters, pair[1].pflops, pair[1].run))
    curves, observations = map(list, zip(*pairs, strict=True))
    names = {observation.run for observation in observations}
    used = [run for run in begun if run.name in names]
    return Study(
        metric,
        lmbda,
        curves,
        observations,
        sorted(excluded),
        _differences(used, metric),
        _shared(used, "run.sweep"),
        _shared(used, "log.project"),
        _distortion(used[0]),
        next(_family(run) for run in used if run.name == observations[0].run),
    )


def _special(run: Run) -> list[str]:
    """Why the loss or the compute of a run is not comparable with that of a fixed-rate codec trained from scratch."""
    reasons = {
        "it is trained for a vision model, with another loss": run.setting("objective.target") == "vision_model",
        "it is trained for MS-SSIM, with another loss": _distortion(run) == "ms_ssim",
        "it has variable rate and is trained for many λ": (run.setting("model.rate.levels") or 1) > 1,
        "it started from trained weights, whose compute is not in its journal": run.setting("init_from"),
    }
    return [reason for reason, holds in reasons.items() if holds]


def _distortion(run: Run) -> str:
    """objective.distortion; runs without the key predate MS-SSIM."""
    return run.setting("objective.distortion") or "mse"


def _family(run: Run) -> str:
    """model.family; runs without the key predate families."""
    return run.setting("model.family") or "hpcm"


def _lines(run: Run) -> int:
    return sum(run.records.rows(metric).size for metric in (EVALUATION, TRAINING))


def _is_evaluated(run: Run) -> bool:
    return bool(run.records.rows(EVALUATION).size or run.setting("eval.images"))


def _chosen_lmbda(runs: Sequence[Run], lmbda: float | None) -> float:
    present = sorted({float(run.config["objective"]["lmbda"]) for run in runs})
    listed = ", ".join(f"{value:g}" for value in present)
    if lmbda is None:
        if len(present) > 1:
            raise UserError(
                "several-lambdas",
                "--lmbda",
                f"the runs have several λ ({listed}), whose losses are not comparable; choose one with --lmbda",
            )
        return present[0] if present else float("nan")
    near = [value for value in present if np.isclose(value, lmbda, rtol=1e-9, atol=0)]
    if not near:
        raise UserError("absent-lambda", "--lmbda", f"no run has λ = {lmbda:g}; choose from {listed or 'none yet'}")
    return near[0]


def _observe(run: Run, metric: str, lmbda: float, cooldown_of: str | None) -> tuple[Curve, Observation]:
    its_lmbda = float(run.config["objective"]["lmbda"])
    if its_lmbda != lmbda:
        raise Excluded(f"its λ is {its_lmbda:g}, not {lmbda:g}")
    steps, pflops, images, loss = usable_lines(run, metric)
    try:
        parameters = parameters_of(run.config)
    except UserError as error:
        raise Excluded(str(error)) from None
    pixels = training_pixels(run.config, steps, images)
    if pixels is None:
        raise Excluded("its configuration lacks data.crop")
    rates = learning_rates(run, steps)
    decayed = annealed(run.config, steps, rates)
    fit = smoothed(pflops, loss, rates)
    if not fit.min() > 0:
        raise Excluded("its loss varies too much to be smoothed")
    model = str(run.config["model"]["name"])
    curve = Curve(run.name, model, parameters, pflops, pixels, loss, fit, rates, decayed)
    observation = Observation(
        run=run.name,
        model=model,
        parameters=parameters,
        lmbda=lmbda,
        seed=int(run.config["train"].get("seed", 0)),
        flops_per_pixel=float(pflops[-1] * 1e15 / pixels[-1]),
        cooldown_of=cooldown_of,
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
    """Settings that differ between runs and change the loss."""
    notes = []
    if len(families := sorted({_family(run) for run in runs})) > 1:
        notes.append(f"the runs are of several families ({', '.join(families)}), which may follow different laws")
    if changing := [run.name for run in runs if metric == TRAINING and run.setting("schedule.crops")]:
        notes.append(f"the training crops of {', '.join(changing)} change during training, and the loss with them")
    for key in ("data.crop", "schedule.crops", *(() if metric == TRAINING else ("eval.images", "eval.limit"))):
        # The last component only: a path may differ between nodes.
        values = sorted({printable(PurePath(str(run.setting(key) or None)).name) for run in runs})
        if len(values) > 1:
            notes.append(f"the runs differ in {key} ({', '.join(values)}): their losses may not be comparable")
    return notes


def _shared(runs: Sequence[Run], key: str) -> str | None:
    values = {run.setting(key) for run in runs}
    return values.pop() if len(values) == 1 else None
