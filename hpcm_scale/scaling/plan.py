"""Plan of a training run for a compute budget: size, steps, predicted loss, and the command."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, cast

import numpy as np
from scipy.optimize import brentq
from scipy.stats import linregress

from hpcm_scale.compute.hardware import peak_of_option
from hpcm_scale.compute.tracker import PETA, TRAINING_FACTOR
from hpcm_scale.config.checks import check, side_multiple
from hpcm_scale.config.compose import compose_model, preset_names
from hpcm_scale.config.schema import IMAGES
from hpcm_scale.errors import UserError
from hpcm_scale.files import json_text
from hpcm_scale.formatting import count, duration, significant, terminal, terminal_table
from hpcm_scale.limits import BUDGET, CONFIDENCE, COUNT, CROP, UTILISATION, check_numbers, number
from hpcm_scale.model.ladder import LARGEST, SMALLEST, compose_sized, size_name, sized
from hpcm_scale.model.parameters import forward_flops_per_image, on_meta, parameter_count
from hpcm_scale.scaling.analysis import PARAMETERS_AND_DATA, Analysis
from hpcm_scale.scaling.findings import SHORT, loss, no_optimum
from hpcm_scale.scaling.laws.compute_optimal import ComputeOptimal
from hpcm_scale.scaling.laws.law import Law, Prediction

SECONDS_A_DAY = 86_400
BATCH = 32
"""Default images per step, as in conf/experiment."""
PER_NODE = 8
"""GPUs of one node; a run with more uses a hostfile."""


@dataclass(frozen=True)
class Setting:
    """Hardware and recipe of the planned run."""

    gpus: int = number(8, IMAGES)
    gpu: str = "H100"
    mfu: float = number(0.4, UTILISATION)
    precision: str = "bf16"
    batch_size: int | None = number(None, IMAGES)
    """Images per step; by default 32 or the next multiple of the GPUs."""
    crop: int = number(256, CROP)
    images_in_set: int | None = number(None, COUNT)
    level: float = number(0.95, CONFIDENCE)

    def peak(self) -> float:
        """Peak FLOP/s of all GPUs. Raises UserError for an unknown GPU."""
        return self.gpus * peak_of_option(self.gpu, self.precision == "bf16")

    @property
    def batch(self) -> int:
        """Images per step."""
        return self.batch_size or self.gpus * math.ceil(BATCH / self.gpus)

    def pflops(self, days: float) -> float:
        """Compute of the GPUs in `days`."""
        return days * SECONDS_A_DAY * self.peak() * self.mfu / PETA


@dataclass(frozen=True)
class Training:
    """One size trained with the whole budget."""

    model: str | None
    """Preset of conf/model; None for the compute-optimal size itself."""
    parameters: float
    pixels: float
    steps: int
    images: int
    epochs: float | None
    """Passes over the data set; None if its number of images is not given."""
    loss: float | None
    """Predicted; None if no law predicts it for this size."""
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Plan:
    """Plan for a compute budget."""

    pflops: float
    days: float
    """Duration with `setting`."""
    level: float
    laws: tuple[str, ...]
    """Names of the laws it uses."""
    optimum: Training
    presets: tuple[Training, ...]
    """Presets next to the optimum, by parameters."""
    chosen: str
    """The one of `presets` with the lowest predicted loss, or else the nearest."""
    outside: tuple[str, ...]
    """Quantities outside the observed range, one sentence each."""
    notes: tuple[str, ...]
    command: str
    setting: Setting

    def to_json(self) -> str:
        """The plan as JSON."""
        return json_text(asdict(self), indent=2)


@dataclass(frozen=True)
class _Guide:
    """The laws that a plan follows."""

    laws: tuple[Law, ...]
    best: Callable[[float], float]
    """Compute-optimal parameters at a budget in PFLOPs."""
    expected: Law
    """Loss at a budget in PFLOPs."""
    of_both: Law | None
    """L(N, D)."""
    notes: tuple[str, ...]


def make_plan(
    analysis: Analysis, setting: Setting, *, pflops: float | None = None, target_loss: float | None = None
) -> Plan:
    """Plan for a budget in PFLOPs, or for the least budget that reaches a loss; exactly one of them is given.

    The size follows from L(N, D) and the measured cost per pixel, or else, with a note, from the sizes on the frontier.
    Raises UserError for a setting, budget or loss out of range, and if no law gives a size.
    """
    assert pflops is None or target_loss is None
    _check(setting, pflops)
    guide = _guide(analysis)
    if pflops is None:
        assert target_loss is not None
        pflops = _compute_for(target_loss, guide.expected)
    parameters = float(guide.best(pflops))
    presets = _presets(analysis.family, parameters, pflops, guide, setting)
    optimum = _optimum(parameters, pflops, guide, setting, presets)
    chosen = min(presets, key=lambda each: (each.loss or math.inf, abs(math.log(each.parameters / parameters))))
    assert chosen.model is not None
    notes = [*guide.notes]
    if setting.batch > (setting.batch_size or BATCH):
        notes.append(f"{setting.batch} images per step, since {BATCH} is not divisible by {setting.gpus} GPUs")
    if not presets[0].parameters <= parameters <= presets[-1].parameters:
        notes.append(f"the compute-optimal size, {count(parameters)}, is outside the presets of conf/model")
    if SMALLEST <= parameters <= LARGEST:
        size = size_name(int(round(parameters, 1 - math.floor(math.log10(parameters)))))
        notes.append(f"a model of the compute-optimal size: model={analysis.family} model.size={size}")
    return Plan(
        pflops,
        pflops * PETA / (setting.peak() * setting.mfu) / SECONDS_A_DAY,
        setting.level,
        tuple(law.name for law in guide.laws),
        optimum,
        presets,
        chosen.model,
        _outside(analysis, guide, pflops, chosen),
        tuple(notes),
        _command(analysis, chosen, setting),
        setting,
    )


def _check(setting: Setting, pflops: float | None) -> None:
    check_numbers(setting, "--")
    BUDGET.check("the budget in PFLOPs", pflops)
    if setting.batch_size is not None and setting.batch_size % setting.gpus:
        near = setting.gpus * math.ceil(setting.batch_size / setting.gpus)
        raise UserError(
            "batch-size-not-divisible",
            "--batch-size",
            f"--batch-size {setting.batch_size} is not divisible by --gpus {setting.gpus}; use --batch-size {near}",
        )


def _guide(analysis: Analysis) -> _Guide:
    optimal = analysis.laws.get("compute_optimal")
    if isinstance(optimal, ComputeOptimal):
        of_both = analysis.laws[PARAMETERS_AND_DATA]
        return _Guide((of_both, optimal), lambda c: optimal.optimum(c).parameters, optimal, of_both, optimal.warnings)
    reason = no_optimum(analysis)
    for of, points in (("compute", analysis.frontier_annealed), ("compute_whole", analysis.frontier)):
        law = analysis.laws.get(analysis.preferred.get(of, ""))
        if law is None or law.at_bound or len({point.parameters for point in points}) < 2:
            continue
        line = cast(Any, linregress(np.log([p.pflops for p in points]), np.log([p.parameters for p in points])))
        note = (
            f"no compute-optimal law ({reason}): the size is interpolated between the sizes on the frontier, which "
            "depends on the sizes that were trained"
        )
        best = partial(_on_line, float(line.slope), float(line.intercept))
        return _Guide((law,), best, law, None, (note, *law.warnings))
    raise UserError(
        "no-law-for-plan",
        "--laws",
        f"these laws cannot predict a size ({reason}), and no frontier has two sizes; train more sizes and amounts of "
        "data",
    )


def _on_line(slope: float, intercept: float, pflops: float) -> float:
    return math.exp(intercept + slope * math.log(pflops))


def _compute_for(loss: float, law: Law) -> float:
    """PFLOPs at which a law falls to `loss`."""
    irreducible = law.parameters.get("E", 0.0)
    if not 0 < loss < math.inf:
        raise UserError("invalid-target-loss", "--target-loss", f"--target-loss {loss:g} must be positive and finite")
    if loss <= irreducible:
        raise UserError(
            "target-loss-below-irreducible",
            "--target-loss",
            f"no budget reaches a loss of {loss:g}, because the irreducible loss E is {irreducible:.4f}; choose a "
            "higher loss",
        )

    def above(log_compute: float) -> float:
        return math.log(float(law.predict(math.exp(log_compute)).value) / loss)

    low, high = math.log(1e-12), math.log(1e18)
    if above(low) < 0 or above(high) > 0:
        raise UserError(
            "unreachable-target-loss",
            "--target-loss",
            f"no budget from 1e-12 to 1e18 PFLOPs has a predicted loss of {loss:g}; choose another one",
        )
    return math.exp(brentq(above, low, high, xtol=1e-12))  # pyright: ignore[reportArgumentType]


def _presets(family: str, parameters: float, pflops: float, guide: _Guide, setting: Setting) -> tuple[Training, ...]:
    """The presets next to the compute-optimal size, up to one on either side, at their own cost."""
    sizes = sorted((_parameters(name), name) for name in _names(family))
    above = next((index for index, (size, _) in enumerate(sizes) if size >= parameters), len(sizes))
    trainings = []
    for size, name in sizes[max(above - 1, 0) : above + 1]:
        pixels = pflops * PETA / _flops_per_image(name, setting.crop) * setting.crop**2
        expected = guide.of_both.predict((size, pixels), setting.level) if guide.of_both else None
        trainings.append(_training(name, size, pixels, expected, setting))
    return tuple(trainings)


@cache
def _names(family: str) -> list[str]:
    """Presets of a family, or its default size if it has none."""
    models = {name: compose_model(name) for name in preset_names("model")}
    names = [name for name, model in models.items() if model.family == family and model.size is None]
    return names or [family]


@cache
def _parameters(preset: str) -> int:
    return parameter_count(on_meta(sized(compose_model(preset))))


@cache
def _flops_per_image(preset: str, crop: int) -> int:
    model = sized(compose_model(preset))
    multiple = side_multiple(model)
    if crop % multiple:
        raise UserError(
            "crop-not-multiple",
            "--crop",
            f"--crop {crop} does not fit {preset}; use a multiple of {multiple} pixels",
        )
    return TRAINING_FACTOR * forward_flops_per_image(on_meta(model), crop)


def _optimum(
    parameters: float, pflops: float, guide: _Guide, setting: Setting, presets: tuple[Training, ...]
) -> Training:
    expected = guide.expected.predict(pflops, setting.level)
    if isinstance(guide.expected, ComputeOptimal):
        pixels = float(guide.expected.optimum(pflops).pixels)
    else:  # interpolated between the presets next to it
        sizes, pixels = zip(*((math.log(each.parameters), math.log(each.pixels)) for each in presets), strict=True)
        pixels = math.exp(float(np.interp(math.log(parameters), sizes, pixels)))
    return _training(None, parameters, pixels, expected, setting)


def _training(
    model: str | None, parameters: float, pixels: float, expected: Prediction | None, setting: Setting
) -> Training:
    steps = max(1, round(pixels / (setting.batch * setting.crop**2)))
    images = steps * setting.batch
    epochs = images / setting.images_in_set if setting.images_in_set else None
    value, low, high = map(_finite, expected) if expected is not None else (None, None, None)
    return Training(model, parameters, pixels, steps, images, epochs, value, low, high)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _outside(analysis: Analysis, guide: _Guide, pflops: float, chosen: Training) -> tuple[str, ...]:
    observed = {name: bounds for law in guide.laws for name, bounds in law.observed.items()}
    for name, quantity in (("N", "parameters"), ("D", "pixels"), ("C", "pflops")):
        values = [getattr(point, quantity) for point in analysis.observations]
        observed.setdefault(name, (min(values), max(values)))
    what = {
        "C": ("the budget", pflops, "PFLOPs"),
        "N": ("the size", chosen.parameters, "parameters"),
        "D": ("the training data", chosen.pixels, "pixels"),
    }
    found = []
    for name, (subject, value, unit) in what.items():
        low, high = observed[name]
        if value > high * 1.001:
            found.append(
                f"{subject} is {significant(value / high, 2)} times the largest observed ({count(high)} {unit})"
            )
        if value < low / 1.001:
            found.append(f"{subject} is 1/{significant(low / value, 2)} of the smallest observed ({count(low)} {unit})")
    return tuple(found)


def _command(analysis: Analysis, chosen: Training, setting: Setting) -> str:
    """The training command, whose configuration is composed and checked."""
    overrides = [
        f"model={chosen.model}",
        *(["objective=ms_ssim"] if analysis.distortion == "ms_ssim" else []),
        f"objective.lmbda={analysis.lmbda:g}",
        f"train.steps={chosen.steps}",
        f"train.batch_size={setting.batch}",
        f"engine.precision={setting.precision}",
        "data.shards=shards",
        "eval.images=kodak",
        f"run.dir=runs/{chosen.model}_{chosen.steps}_steps",
    ]
    if setting.crop != 256:
        overrides.insert(-4, f"data.crop={setting.crop}")
    check(compose_sized(overrides), setting.gpus)
    launcher = f"--num_gpus {setting.gpus}" if setting.gpus <= PER_NODE else "--hostfile hostfile"
    return shlex.join(["deepspeed", *launcher.split(), "--module", "hpcm_scale.train", *overrides])


def print_plan(plan: Plan) -> None:
    """Print sizes, predicted losses, notes and the command."""
    console, setting = terminal(), plan.setting
    console.print(
        f"{significant(plan.pflops)} PFLOPs: {duration(plan.days * SECONDS_A_DAY)} on {setting.gpus} × {setting.gpu} "
        f"at {setting.mfu:.0%} of their {setting.precision} peak"
    )
    epochs = ["epochs"] if setting.images_in_set else []
    rows = []
    for training in (plan.optimum, *plan.presets):
        name = training.model or "optimum"
        row = [f"{name} ←" if name == plan.chosen else name, count(training.parameters), count(training.pixels)]
        row += [count(training.images), f"{training.steps:,}"]
        row += [] if training.epochs is None else [significant(training.epochs, 3)]
        rows.append([*row, _loss(training)])
    headings = ["size", "parameters", "pixels", "images", "steps", *epochs, f"loss ({plan.level * 100:g} %)"]
    console.print(terminal_table(headings, rows))
    laws = ", ".join(SHORT[name] for name in plan.laws)
    console.print(f"Laws: {laws}. Steps of {setting.batch} crops of {setting.crop}².", soft_wrap=True)
    for sentence in plan.outside:
        console.print(f"Extrapolation: {sentence}.", soft_wrap=True)
    for sentence in plan.notes:
        console.print(f"Note: {sentence}.", soft_wrap=True)
    print(f"\n{plan.command}")


def _loss(training: Training) -> str:
    if training.loss is None:
        return "unknown"
    if training.low is None or training.high is None:
        return loss(training.loss)
    return f"{loss(training.loss)} ({loss(training.low)}…{loss(training.high)})"
