"""Loss curves and end points of runs, before any law is fitted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import PurePath
from typing import Any

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
RECIPE = {
    "model.family": "hpcm",
    "model.start": "random",
    "objective.likelihood": "survival",
    "optimizer.name": "adam",
    "train.parametrisation": "standard",
    "train.batch_size": None,
    "train.ema": [],
    "schedule.learning_rate": None,
    "schedule.warmup": 0,
    "schedule.crops": [],
    "data.crop": None,
    "data.downscale": 1.0,
    "data.shards": None,
    "engine.precision": "fp32",
    "eval.images": None,
    "eval.limit": None,
}
"""Configuration keys that change the loss, with the value that configurations without the key have."""
DIVERGED = 1.2
"""A run that ends at more than so many times its lowest smoothed loss has diverged."""
SHOWN = 3
"""Excluded runs that an error names."""
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
    learning_rate: float | None = None
    """schedule.learning_rate."""
    unique: float | None = None
    """Pixels of the training set, images × crop², which repeat from there on; None if the journal does not tell."""


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
    recipe: dict[str, Any] = field(default_factory=dict)
    """Values of the keys of RECIPE that all runs share."""

    @property
    def family(self) -> str:
        """model.family of the runs, or hpcm."""
        return self.recipe.get("model.family", "hpcm")


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
        more = [f"and {len(excluded) - SHOWN} more"] if len(excluded) > SHOWN else []
        causes = "; ".join([*excluded[:SHOWN], *more]) or "there is none"
        raise UserError("no-usable-runs", "", f"no run is usable ({causes}); correct these causes or give other runs")
    pairs.sort(key=lambda pair: (pair[1].parameters, pair[1].pflops, pair[1].run))
    copies = _copies([curve for curve, _ in pairs])
    excluded += [f"{name} is excluded: it is a copy of {original}" for name, original in copies.items()]
    curves, observations = map(list, zip(*(pair for pair in pairs if pair[1].run not in copies), strict=True))
    names = {observation.run for observation in observations}
    used = [run for run in begun if run.name in names]
    recipe, differences = _recipe(used, metric)
    annealed_runs = [run for run in used if any(each.run == run.name and each.annealed for each in observations)]
    recipe |= _schedule(annealed_runs)
    return Study(
        metric,
        lmbda,
        curves,
        observations,
        sorted(excluded),
        [*differences, *_same_seed(observations)],
        _shared(used, "run.sweep"),
        _shared(used, "log.project"),
        _distortion(used[0]),
        recipe,
    )


def _copies(curves: Sequence[Curve]) -> dict[str, str]:
    """Runs that end with a line of another run of the same size: name of each copy, and of the run it repeats."""
    copies: dict[str, str] = {}
    for first, second in combinations(curves, 2):
        if first.parameters != second.parameters or {first.run, second.run} & copies.keys():
            continue
        shorter, longer = sorted((second, first), key=lambda curve: curve.pixels[-1])
        _, ours, theirs = np.intersect1d(shorter.pixels, longer.pixels, return_indices=True)
        same = shorter.loss[ours] == longer.loss[theirs]
        if ours.size and ours[-1] == shorter.loss.size - 1 and same.all():
            copies[shorter.run] = longer.run
    return copies


def _same_seed(observations: Sequence[Observation]) -> list[str]:
    groups: dict[tuple, list[str]] = {}
    for each in observations:
        groups.setdefault((each.model, each.seed, each.pixels, each.annealed), []).append(each.run)
    return [
        f"{' and '.join(names)} have one model, seed and amount of data, so that their losses may not be independent"
        for names in groups.values()
        if len(names) > 1
    ]


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
    final = float(fit[-1] if metric == TRAINING else loss[-1])
    if final > DIVERGED * fit.min():
        raise Excluded(f"it has diverged: its loss was {fit.min():.4g} and ends at {final:.4g}")
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
        loss=final,
        bpp=end(run, metric.replace("loss", "bpp"), steps[-1]),
        psnr=end(run, metric.replace("loss", "psnr"), steps[-1]),
        annealed=bool(decayed[-1]),
        finished=run.finished,
        learning_rate=run.setting("schedule.learning_rate"),
        unique=_unique_pixels(run),
    )
    return curve, observation


def _unique_pixels(run: Run) -> float | None:
    images = run.records.column("data/images")
    known = images[np.isfinite(images)]
    return float(known[-1] * run.config["data"]["crop"] ** 2) if known.size else None


def _recipe(runs: Sequence[Run], metric: str) -> tuple[dict[str, Any], list[str]]:
    """The shared values of the keys of RECIPE, and a sentence on each key in which the runs differ."""
    shared, notes = {}, []
    for key, default in RECIPE.items():
        if metric == TRAINING and key.startswith("eval."):
            continue
        found = [default if (value := run.setting(key)) is None else value for run in runs]
        # Of paths the last component only: a path may differ between nodes.
        paths = key in ("data.shards", "eval.images")
        values = sorted({_last_components(value) if paths else str(value) for value in found})
        if len(values) == 1:
            shared[key] = values[0] if paths and found[0] is not None else found[0]
        else:
            shown = ", ".join(map(printable, values if len(values) < 5 else [*values[:2], "…", values[-1]]))
            notes.append(f"the runs differ in {key} ({shown}): their losses may not be comparable")
    if changing := [run.name for run in runs if metric == TRAINING and run.setting("schedule.crops")]:
        notes.append(f"the training crops of {', '.join(changing)} change during training, and the loss with them")
    return shared, notes


def _schedule(runs: Sequence[Run]) -> dict[str, Any]:
    """The shape of the schedule that annealed runs share; the length of a decay as a fraction of the run."""
    found = []
    for run in runs:
        decay, steps = run.setting("schedule.decay") or 0.0, run.config["train"]["steps"]
        fraction = round(decay if decay <= 1 else decay / steps, 2)
        boundaries = [each if each <= 1 else each / steps for each in run.setting("schedule.boundaries") or []]
        found.append((fraction, [round(each, 3) for each in boundaries], run.setting("schedule.factors") or [1.0]))
    if not found or any(each != found[0] for each in found):
        return {}
    return dict(zip(("schedule.decay", "schedule.boundaries", "schedule.factors"), found[0], strict=True))


def _last_components(value: Any) -> str:
    entries = value if isinstance(value, list) else [value]
    return ", ".join(PurePath(str(each["path"] if isinstance(each, dict) else each)).name for each in entries)


def _shared(runs: Sequence[Run], key: str) -> str | None:
    values = {run.setting(key) for run in runs}
    return values.pop() if len(values) == 1 else None
