"""Plan of a training run for a compute budget: size, data, predicted loss, and the command."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from hpcm_scale.compute.hardware import peak_of_option
from hpcm_scale.compute.tracker import PETA
from hpcm_scale.config.checks import check, side_multiple
from hpcm_scale.config.compose import compose_model, preset_names
from hpcm_scale.config.schema import IMAGES, ModelConfig, OptimizerConfig
from hpcm_scale.errors import UserError
from hpcm_scale.files import json_text
from hpcm_scale.formatting import DASH, count, duration, significant, terminal, terminal_table
from hpcm_scale.limits import BUDGET, COUNT, CROP, UTILISATION, check_numbers, number
from hpcm_scale.model.ladder import LARGEST, SMALLEST, compose_sized, count_parameters, size_name
from hpcm_scale.model.parameters import on_meta
from hpcm_scale.scaling.analysis import COMPUTE_OPTIMAL, PARAMETERS_AND_DATA, Analysis
from hpcm_scale.scaling.findings import AS_GOOD_AS_NEW, caveats, expected
from hpcm_scale.scaling.laws.compute_optimal import ComputeOptimal
from hpcm_scale.scaling.laws.law import Prediction
from hpcm_scale.training.costs import optimizer_flops, training_flops_per_image

SECONDS_A_DAY = 86_400
PER_NODE = 8
"""GPUs of one node; a run with more uses a hostfile."""
FARTHEST = {"N": 10.0, "D": 10.0, "C": 100.0}
"""Multiple of the largest observed parameters, pixels and compute beyond which a plan has no command."""
ARCHITECTURE = ("fusion", "stem_kernel", "partial_ratio", "expansion", "hyper_placement", "context_channels", "options")
"""Fields of `ModelConfig` that sizes of one ladder share."""
BATCH = 32
"""Default images per step, as in conf/experiment."""


@dataclass(frozen=True)
class Setting:
    """Hardware of the planned run, and what may differ from the recipe of the law."""

    gpus: int = number(8, IMAGES)
    gpu: str = "H100"
    mfu: float = number(0.4, UTILISATION)
    precision: str = "bf16"
    batch_size: int | None = number(None, IMAGES)
    """Images per step; by default those of the law's runs, or the next multiple of the GPUs."""
    crop: int | None = number(None, CROP)
    """By default that of the law's runs."""
    images_in_set: int | None = number(None, COUNT)

    def peak(self) -> float:
        """Peak FLOP/s of all GPUs. Raises UserError for an unknown GPU."""
        return self.gpus * peak_of_option(self.gpu, self.precision == "bf16")

    def pflops(self, days: float) -> float:
        """Compute of the GPUs in `days`."""
        return days * SECONDS_A_DAY * self.peak() * self.mfu / PETA


@dataclass(frozen=True)
class Training:
    """One size trained with the whole budget."""

    model: tuple[str, ...]
    """Overrides such as ("model=68m",) or ("model=hpcm", "model.size=30m")."""
    parameters: int
    pixels: float
    steps: int
    images: int
    epochs: float | None
    """Passes over the data set; None if its number of images is not given."""
    loss: Prediction


@dataclass(frozen=True)
class Plan:
    """Plan for a compute budget; intervals are at `level`."""

    pflops: Prediction
    """The budget; for a target loss with the confidence interval of the compute that reaches it."""
    days: float
    """Duration with `setting`."""
    level: float
    parameters: Prediction
    """N*."""
    pixels: Prediction
    """D*."""
    loss: Prediction
    """At N* and D*, of one new training."""
    trainings: tuple[Training, ...]
    """The model of the compute-optimal size, and the presets beside it; the first is recommended."""
    outside: tuple[str, ...]
    """Quantities outside the observed range, one sentence each."""
    notes: tuple[str, ...]
    command: str | None
    """None if the extrapolation is too far (`FARTHEST`)."""
    setting: Setting

    def to_json(self) -> str:
        """The plan as JSON; a prediction is value, lower and upper bound."""
        return json_text(asdict(self), indent=2)


def make_plan(
    analysis: Analysis, setting: Setting, *, pflops: float | None = None, target_loss: float | None = None
) -> Plan:
    """Plan for a budget in PFLOPs, or for the least budget that reaches a loss; exactly one of them is given.

    Raises UserError without a compute-optimal law, and for a setting, budget or loss out of range.
    """
    assert (pflops is None) != (target_loss is None)
    check_numbers(setting, "--")
    BUDGET.check("the budget in PFLOPs", pflops)
    law = analysis.laws.get(COMPUTE_OPTIMAL)
    if not isinstance(law, ComputeOptimal):
        raise UserError(
            "no-law-for-plan",
            "--laws",
            f"these laws cannot predict a size ({analysis.refused[COMPUTE_OPTIMAL]}); `hpcm scaling design` lists "
            "trainings that can",
        )
    budget = Prediction(pflops, pflops, pflops) if target_loss is None else _compute_for(law, target_loss, analysis)
    size, data = law.optimum_intervals(budget.value, analysis.level)
    crop = setting.crop or analysis.recipe.get("data.crop") or 256
    batch = _batch(analysis, setting)
    trainings = []
    for overrides, model in _models(analysis, size.value):
        pixels = budget.value * PETA / _flops_per_image(model, crop, batch, _optimizer(analysis)) * crop**2
        steps = max(1, round(pixels / (batch * crop**2)))
        images = steps * batch
        parameters = count_parameters(model)
        trainings.append(
            Training(
                overrides,
                parameters,
                pixels,
                steps,
                images,
                images / setting.images_in_set if setting.images_in_set else None,
                analysis.laws[PARAMETERS_AND_DATA].predict((parameters, pixels), analysis.level),
            )
        )
    chosen = {"train.batch_size": batch, "data.crop": crop, "engine.precision": setting.precision}
    rate = analysis.recipe.get("schedule.learning_rate")
    if rate is None:
        rate = min(analysis.observations, key=lambda each: abs(math.log(each.parameters / size.value))).learning_rate
    outside, near = _outside(analysis, budget.value, size.value, data.value)
    recipe = analysis.recipe | chosen | {"schedule.learning_rate": rate}
    command = _command(analysis, trainings[0], setting, recipe) if near and trainings else None
    return Plan(
        budget,
        budget.value * PETA / (setting.peak() * setting.mfu) / SECONDS_A_DAY,
        analysis.level,
        size,
        data,
        law.predict(budget.value, analysis.level),
        tuple(trainings),
        outside,
        tuple(dict.fromkeys([*_notes(analysis, trainings[:1], chosen), *caveats(analysis), *law.warnings])),
        command,
        setting,
    )


def _notes(analysis: Analysis, trained: Sequence[Training], chosen: dict[str, Any]) -> list[str]:
    """How the recommended training, if there is one, differs from those of the law; `chosen` are keys of its recipe."""
    notes = []
    if differing := [key for key, value in chosen.items() if analysis.recipe.get(key, value) != value]:
        shown = ", ".join(f"{key}={chosen[key]} (not {analysis.recipe[key]})" for key in differing)
        notes.append(f"the law is of another recipe than this plan: {shown}")
    longest = max(each.images for each in analysis.observations)
    seen = max((each.pixels / each.unique for each in analysis.observations if each.unique), default=0.0)
    for training in trained:
        if training.images > 2 * longest:
            notes.append(
                f"the run is {significant(training.images / longest, 2)} times as long as the longest observed: the "
                "best learning rate falls with the length (`hpcm scaling horizon` measures it)"
            )
        if training.epochs and training.epochs > max(seen, AS_GOOD_AS_NEW):
            known = f", the runs of this law at most {significant(seen, 2)} times" if seen else ""
            notes.append(
                f"the run passes over its data {significant(training.epochs, 2)} times{known}: repeated data is worth "
                "less than new data, and the predicted loss is too low"
            )
    if analysis.recipe.get("schedule.learning_rate") is None:
        notes.append("the runs share no learning rate: the command has that of the nearest size")
    return notes


def _batch(analysis: Analysis, setting: Setting) -> int:
    """Images per step, a multiple of the GPUs."""
    if setting.batch_size is not None and setting.batch_size % setting.gpus:
        near = setting.gpus * math.ceil(setting.batch_size / setting.gpus)
        raise UserError(
            "batch-size-not-divisible",
            "--batch-size",
            f"--batch-size {setting.batch_size} is not divisible by --gpus {setting.gpus}; use --batch-size {near}",
        )
    wanted = setting.batch_size or analysis.recipe.get("train.batch_size") or BATCH
    return setting.gpus * math.ceil(wanted / setting.gpus)


def _compute_for(law: ComputeOptimal, target: float, analysis: Analysis) -> Prediction:
    """PFLOPs at which the compute-optimal law falls to a loss."""
    if not 0 < target < math.inf:
        raise UserError("invalid-target-loss", "--target-loss", f"--target-loss {target:g} must be positive and finite")
    found = law.compute_for(target, analysis.level)
    irreducible = law.parameters["E"]
    if not found.value < math.inf:
        raise UserError(
            "target-loss-below-irreducible",
            "--target-loss",
            f"no budget reaches a loss of {target:g}, because the irreducible loss E is {irreducible:.4f}; choose a "
            "higher loss",
        )
    if not 1e-9 <= found.value <= 1e30:
        raise UserError(
            "unreachable-target-loss",
            "--target-loss",
            f"a predicted loss of {target:g} needs {found.value:.2g} PFLOPs, which is no budget; choose another one "
            f"(the irreducible loss E is {irreducible:.4f})",
        )
    return found


def _models(analysis: Analysis, parameters: float) -> list[tuple[tuple[str, ...], ModelConfig]]:
    """The model of the compute-optimal size by the rule of `model.size`, and the presets beside it.

    Presets come first if the runs are of presets.
    """
    family = analysis.family
    presets = sorted((count_parameters(model), name, model) for name, model in _presets(family, _names(analysis)))
    above = next((index for index, (size, *_) in enumerate(presets) if size >= parameters), len(presets))
    beside = [((f"model={name}",), model) for _, name, model in presets[max(above - 1, 0) : above + 1]]
    beside.sort(key=lambda each: abs(math.log(count_parameters(each[1]) / parameters)))
    by_rule = []
    if SMALLEST <= parameters <= LARGEST:
        size = size_name(int(round(parameters, 1 - math.floor(math.log10(parameters)))))
        overrides = (f"model={family}", f"model.size={size}")
        by_rule = [(overrides, compose_sized(overrides).model)]
    of_presets = _names(analysis) & {name for _, name, _ in presets}
    inside = presets and presets[0][0] / 2 <= parameters <= 2 * presets[-1][0]
    return [*beside, *by_rule] if of_presets and inside else [*by_rule, *beside]


def _names(analysis: Analysis) -> set[str]:
    return {each.model for each in analysis.observations}


def _presets(family: str, observed: set[str]) -> list[tuple[str, ModelConfig]]:
    """Presets of a family that were observed, or that share the architecture of its default."""
    default = _every_preset()[family]
    return [
        (name, model)
        for name, model in _every_preset().items()
        if model.family == family
        and model.size is None
        and (name in observed or all(getattr(model, key) == getattr(default, key) for key in ARCHITECTURE))
    ]


@cache
def _every_preset() -> dict[str, ModelConfig]:
    return {name: compose_model(name) for name in preset_names("model")}


def _optimizer(analysis: Analysis) -> str:
    return analysis.recipe.get("optimizer.name") or "adam"


def _flops_per_image(model: ModelConfig, crop: int, batch: int, optimizer: str) -> float:
    """Training FLOPs of a crop, with its share of the optimizer's."""
    multiple = side_multiple(model)
    if crop % multiple:
        raise UserError(
            "crop-not-multiple",
            "--crop",
            f"--crop {crop} does not fit {model.name}; use a multiple of {multiple} pixels",
        )
    built = on_meta(model)
    return training_flops_per_image(built, crop) + optimizer_flops(built, _optimizer_config(optimizer)) / batch


@cache
def _optimizer_config(name: str) -> OptimizerConfig:
    return compose_sized([f"optimizer={name}"]).optimizer


def _outside(analysis: Analysis, pflops: float, size: float, pixels: float) -> tuple[tuple[str, ...], bool]:
    """Sentences on quantities outside the observed range, and whether all are within `FARTHEST`."""
    found, near = [], True
    for variable, quantity, subject, value, unit in (
        ("C", "pflops", "the budget", pflops, "PFLOPs"),
        ("N", "parameters", "the size", size, "parameters"),
        ("D", "pixels", "the training data", pixels, "pixels"),
    ):
        values = [getattr(each, quantity) for each in analysis.observations]
        low, high = min(values), max(values)
        near &= low / FARTHEST[variable] <= value <= FARTHEST[variable] * high
        if value > high * 1.001:
            found.append(
                f"{subject} is {significant(value / high, 2)} times the largest observed ({count(high)} {unit})"
            )
        if value < low / 1.001:
            found.append(f"{subject} is 1/{significant(low / value, 2)} of the smallest observed ({count(low)} {unit})")
    if not near:
        found.append(
            "there is no command, because a plan is trusted up to "
            f"{FARTHEST['N']:g} times the observed sizes and data and {FARTHEST['C']:g} times the compute"
        )
    return tuple(found), near


def recipe_overrides(recipe: dict[str, Any]) -> list[str]:
    """Overrides that give a new run the recipe of a study, as far as it differs from the defaults."""
    groups = [f"optimizer={recipe['optimizer.name']}"] if recipe.get("optimizer.name", "adam") != "adam" else []
    if not recipe.get("schedule.boundaries") and recipe.get("schedule.decay"):
        groups.append("schedule=wsd")
    default = asdict(compose_sized(groups))
    overrides = groups
    for key, value in recipe.items():
        section, name = key.split(".")
        if key in ("optimizer.name", "data.shards", "eval.images", "model.family") or value is None:
            continue
        if _plain(default[section][name]) != value:
            overrides.append(f"{key}={_plain(value)}")
    return overrides


def _plain(value: Any) -> Any:
    """A value as in YAML."""
    return getattr(value, "value", value)


def _command(analysis: Analysis, chosen: Training, setting: Setting, recipe: dict[str, Any]) -> str:
    """The training command with a recipe, whose configuration is composed and checked."""
    name = chosen.model[-1].partition("=")[2]
    overrides = [
        *chosen.model,
        *(["objective=ms_ssim"] if analysis.distortion == "ms_ssim" else []),
        f"objective.lmbda={analysis.lmbda:g}",
        f"train.steps={chosen.steps}",
        *recipe_overrides(recipe),
        "data.shards=shards",
        "eval.images=kodak",
        f"run.dir=runs/{name}_{chosen.steps}_steps",
    ]
    check(compose_sized(overrides), setting.gpus)
    launcher = f"--num_gpus {setting.gpus}" if setting.gpus <= PER_NODE else "--hostfile hostfile"
    return shlex.join(["deepspeed", *launcher.split(), "--module", "hpcm_scale.train", *overrides])


def print_plan(plan: Plan) -> None:
    """Print sizes, predicted losses, notes and the command."""
    console, setting = terminal(), plan.setting
    budget = significant(plan.pflops.value)
    if plan.pflops.low != plan.pflops.high:
        budget = expected(plan.pflops, plan.level, significant)
    console.print(
        f"{budget} PFLOPs: {duration(plan.days * SECONDS_A_DAY)} on {setting.gpus} × {setting.gpu} "
        f"at {setting.mfu:.0%} of their {setting.precision} peak",
        soft_wrap=True,
    )
    size, data = (expected(each, plan.level, count) for each in (plan.parameters, plan.pixels))
    best = expected(plan.loss, plan.level)
    console.print(f"Compute-optimal: N* = {size} parameters, D* = {data} pixels, predicted loss {best}", soft_wrap=True)
    rows = []
    for training in plan.trainings:
        epochs = DASH if training.epochs is None else significant(training.epochs, 3)
        steps = f"{training.steps:,}" if training.steps < 10**9 else count(training.steps)
        numbers = [count(training.parameters), count(training.pixels), steps, epochs]
        rows.append([training.model[-1], *numbers, expected(training.loss)])
    headings = ["model", "size", "pixels", "steps", "epochs", f"loss ({plan.level * 100:g} %)"]
    console.print(terminal_table(headings, rows))
    for sentence in plan.outside:
        console.print(f"Extrapolation: {sentence}.", soft_wrap=True)
    for sentence in plan.notes:
        console.print(f"Note: {sentence}.", soft_wrap=True)
    if plan.command:
        print(f"\n{plan.command}")
