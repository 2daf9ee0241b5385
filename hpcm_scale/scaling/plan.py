"""What a compute budget buys, by fitted laws: a size, how long to train it, the loss to expect, and the command."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial

import numpy as np
from scipy.optimize import brentq
from scipy.stats import linregress

from hpcm_scale.compute.hardware import peak_of
from hpcm_scale.compute.tracker import PETA, TRAINING_FACTOR
from hpcm_scale.config.checks import check, side_multiple
from hpcm_scale.config.compose import compose, compose_model, preset_names
from hpcm_scale.config.schema import IMAGES
from hpcm_scale.errors import UserError
from hpcm_scale.files import json_text
from hpcm_scale.limits import BUDGET, CONFIDENCE, COUNT, CROP, UTILISATION, check_numbers, number
from hpcm_scale.model.ladder import LARGEST, SMALLEST, size_name, sized
from hpcm_scale.model.parameters import forward_flops_per_image, on_meta, parameter_count
from hpcm_scale.scaling.analysis import Analysis
from hpcm_scale.scaling.laws.compute_optimal import ComputeOptimal
from hpcm_scale.scaling.laws.law import Law, Prediction
from hpcm_scale.scaling.verdict import no_best_split
from hpcm_scale.scaling.wording import SHORT, count, loss, significant

SECONDS_A_DAY = 86_400
BATCH = 32
"""Images per step of the experiments in conf/experiment."""
PER_NODE = 8
"""GPUs of one machine; more than these are started through a hostfile."""


@dataclass(frozen=True)
class Setting:
    """How the planned run would be trained."""

    gpus: int = number(8, IMAGES)
    gpu: str = "H100"
    mfu: float = number(0.4, UTILISATION)
    precision: str = "bf16"
    batch_size: int | None = number(None, IMAGES)
    """Images per step; unset: 32, or the least above that divides over the GPUs."""
    crop: int = number(256, CROP)
    images_in_set: int | None = number(None, COUNT)
    level: float = number(0.95, CONFIDENCE)

    def peak(self) -> float:
        """FLOP/s of all GPUs together at their peak. Raises UserError for a GPU that is not known."""
        bf16 = self.precision == "bf16"
        peak = peak_of(self.gpu, bf16) or peak_of(self.gpu.upper(), bf16)
        if peak is None:
            raise UserError(
                f"the peak rate of --gpu {self.gpu} is not known; name another, for example A100, H100 or 'H100 PCIe'"
            )
        return self.gpus * peak

    @property
    def batch(self) -> int:
        """Images per step."""
        return self.batch_size or self.gpus * math.ceil(BATCH / self.gpus)

    def pflops(self, days: float) -> float:
        """What the GPUs do in so many days."""
        return days * SECONDS_A_DAY * self.peak() * self.mfu / PETA


@dataclass(frozen=True)
class Training:
    """One size trained for the whole budget."""

    model: str | None
    """Preset of conf/model; None for the optimum itself, which no preset has exactly."""
    parameters: float
    pixels: float
    steps: int
    images: int
    epochs: float | None
    """Over the data set, where its number of images was given."""
    loss: float | None
    """Expected; None where no law tells it for this size."""
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Plan:
    """What a budget buys."""

    pflops: float
    days: float
    """Of the GPUs named, at the utilisation named."""
    level: float
    laws: tuple[str, ...]
    """Names of the laws it rests on."""
    optimum: Training
    presets: tuple[Training, ...]
    """The nearest, in the order of parameters."""
    chosen: str
    """The preset to take: of these the one with the lowest expected loss, or else the nearest."""
    outside: tuple[str, ...]
    """Sentences: in what the plan leaves what was observed."""
    notes: tuple[str, ...]
    command: str
    setting: Setting

    def to_json(self) -> str:
        """All of it, for machines."""
        return json_text(asdict(self), indent=2)


@dataclass(frozen=True)
class _Guide:
    """What the laws at hand say of a budget."""

    laws: tuple[Law, ...]
    best: Callable[[float], float]
    """PFLOPs to parameters."""
    expected: Law
    """Of PFLOPs."""
    joint: Law | None
    notes: tuple[str, ...]


def make_plan(
    analysis: Analysis, setting: Setting, *, pflops: float | None = None, target_loss: float | None = None
) -> Plan:
    """Plan for a budget in PFLOPs, or for the least that reaches a loss.

    With a joint law the best size follows from it and from the measured cost per pixel; without one, from the
    sizes on the frontier, which is said in the notes. Raises UserError for a budget or a loss that cannot be
    planned for, and where the laws carry neither.
    """
    if (pflops is None) == (target_loss is None):
        raise UserError("name either the budget in PFLOPs or the loss to reach")
    _check(setting, pflops)
    guide = _guide(analysis)
    if pflops is None:
        pflops = _compute_for(target_loss, guide.expected)
    parameters = float(guide.best(pflops))
    presets = _presets(analysis.family, parameters, pflops, guide, setting)
    optimum = _optimum(parameters, pflops, guide, setting, presets)
    known = [preset for preset in presets if preset.loss is not None]
    nearest = min(presets, key=lambda preset: abs(math.log(preset.parameters / parameters)))
    chosen = min(known, key=lambda preset: preset.loss) if known else nearest
    notes = [*guide.notes]
    if setting.batch > (setting.batch_size or BATCH):
        notes.append(f"{setting.batch} images per step, for {BATCH} do not divide over {setting.gpus} GPUs")
    if not presets[0].parameters <= parameters <= presets[-1].parameters:
        notes.append(f"the best size, {count(parameters)}, lies outside the presets of conf/model")
    if SMALLEST <= parameters <= LARGEST:
        size = size_name(round(parameters, 1 - math.floor(math.log10(parameters))))
        notes.append(f"a model of the best size itself: model={analysis.family} model.size={size}")
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
            f"--batch-size {setting.batch_size} does not divide over --gpus {setting.gpus}; use --batch-size {near}"
        )


def _guide(analysis: Analysis) -> _Guide:
    optimal = analysis.laws.get("compute_optimal")
    if isinstance(optimal, ComputeOptimal):
        joint = analysis.laws["joint"]
        return _Guide((joint, optimal), lambda c: optimal.optimum(c).parameters, optimal, joint, optimal.warnings)
    why = no_best_split(analysis)
    for key, points in (("compute", analysis.frontier_annealed), ("compute_whole", analysis.frontier)):
        law = analysis.laws.get(analysis.preferred.get(key, ""))
        if law is None or law.at_edge or len({point.parameters for point in points}) < 2:
            continue
        line = linregress(np.log([p.pflops for p in points]), np.log([p.parameters for p in points]))
        note = (
            f"no compute-optimal law ({why}): the size is read off a line through the sizes on the frontier, which "
            "knows only which of the sizes that happened to be trained came first"
        )
        slope, intercept = float(line.slope), float(line.intercept)
        return _Guide((law,), partial(_on_line, slope, intercept), law, None, (note, *law.warnings))
    raise UserError(
        f"these laws cannot plan: {why}, and no law of a frontier over two sizes; train more sizes and amounts of data"
    )


def _on_line(slope: float, intercept: float, pflops: float) -> float:
    return math.exp(intercept + slope * math.log(pflops))


def _compute_for(loss: float, law: Law) -> float:
    """PFLOPs at which a law falls to `loss`."""
    floor = law.parameters.get("E", 0.0)
    if not 0 < loss < math.inf:
        raise UserError(f"--target-loss {loss:g} must be greater than 0, and finite")
    if loss <= floor:
        raise UserError(f"no budget reaches a loss of {loss:g}: the law's floor is {floor:.4f}; name a higher loss")

    def above(log_compute: float) -> float:
        return math.log(float(law.predict(math.exp(log_compute)).value) / loss)

    low, high = math.log(1e-12), math.log(1e18)
    if above(low) < 0 or above(high) > 0:
        raise UserError(f"no budget from 1e-12 to 1e18 PFLOPs gives a loss of {loss:g} by these laws; name another")
    return math.exp(brentq(above, low, high, xtol=1e-12))


def _presets(family: str, parameters: float, pflops: float, guide: _Guide, setting: Setting) -> tuple[Training, ...]:
    """The presets next to the best size, one on either side where there is one, at their own exact cost."""
    sizes = sorted((_parameters(name), name) for name in _names(family))
    above = next((index for index, (size, _) in enumerate(sizes) if size >= parameters), len(sizes))
    trainings = []
    for size, name in sizes[max(above - 1, 0) : above + 1]:
        pixels = pflops * PETA / _flops_per_image(name, setting.crop) * setting.crop**2
        expected = guide.joint.predict((size, pixels), setting.level) if guide.joint else None
        trainings.append(_training(name, size, pixels, expected, setting))
    return tuple(trainings)


@cache
def _names(family: str) -> list[str]:
    """Presets of a family, or else its default size."""
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
        raise UserError(f"--crop {crop} does not fit {preset}, whose inputs are multiples of {multiple} pixels")
    return TRAINING_FACTOR * forward_flops_per_image(on_meta(model), crop)


def _optimum(
    parameters: float, pflops: float, guide: _Guide, setting: Setting, presets: tuple[Training, ...]
) -> Training:
    expected = guide.expected.predict(pflops, setting.level)
    if isinstance(guide.expected, ComputeOptimal):
        pixels = float(guide.expected.optimum(pflops).pixels)
    else:  # between the presets beside it, whose costs are known
        logs = [(math.log(preset.parameters), math.log(preset.pixels)) for preset in presets]
        pixels = math.exp(float(np.interp(math.log(parameters), *zip(*logs, strict=True))))
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
    told = []
    for name, (words, value, unit) in what.items():
        low, high = observed[name]
        if value > high * 1.001:
            told.append(f"{words} is {significant(value / high, 2)} times the most observed ({count(high)} {unit})")
        if value < low / 1.001:
            told.append(f"{words} is 1/{significant(low / value, 2)} of the least observed ({count(low)} {unit})")
    return tuple(told)


def _command(analysis: Analysis, chosen: Training, setting: Setting) -> str:
    """What to type; composed and checked here, so that training will not refuse it."""
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
    check(compose(overrides, sized), setting.gpus)
    launcher = f"--num_gpus {setting.gpus}" if setting.gpus <= PER_NODE else "--hostfile hostfile"
    return shlex.join(["deepspeed", *launcher.split(), "--module", "hpcm_scale.train", *overrides])


# A plan on the terminal.


def print_plan(plan: Plan) -> None:
    """Print sizes, losses, what to beware of, and the command."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    setting = plan.setting
    console.print(
        f"{significant(plan.pflops)} PFLOPs: {_duration(plan.days)} on {setting.gpus} × {setting.gpu} at "
        f"{setting.mfu:.0%} of their {setting.precision} peak"
    )
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("size", no_wrap=True)
    for heading in ("parameters", "pixels", "images", "steps", *(["epochs"] if setting.images_in_set else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"loss ({plan.level * 100:g} %)", justify="right", no_wrap=True)
    for training in (plan.optimum, *plan.presets):
        name = training.model or "optimum"
        row = [f"{name} ←" if name == plan.chosen else name, count(training.parameters), count(training.pixels)]
        row += [count(training.images), f"{training.steps:,}"]
        row += [significant(training.epochs, 3)] if setting.images_in_set else []
        table.add_row(*row, _loss(training))
    console.print(table)
    laws = ", ".join(SHORT[name] for name in plan.laws)
    console.print(f"By the laws: {laws}. Steps of {setting.batch} crops of {setting.crop}².", soft_wrap=True)
    for sentence in plan.outside:
        console.print(f"Outside what was observed: {sentence}.", soft_wrap=True)
    for sentence in plan.notes:
        console.print(f"Note: {sentence[0].upper()}{sentence[1:]}.", soft_wrap=True)
    print(f"\n{plan.command}")


def _loss(training: Training) -> str:
    if training.loss is None:
        return "unknown"
    if training.low is None or training.high is None:
        return loss(training.loss)
    return f"{loss(training.loss)} ({loss(training.low)}…{loss(training.high)})"


def _duration(days: float) -> str:
    if days >= 2:
        return f"{days:,.1f} days"
    if days >= 2 / 24:
        return f"{days * 24:,.1f} hours"
    if days >= 2 / (24 * 60):
        return f"{significant(days * 24 * 60, 2)} minutes"
    return f"{significant(days * 24 * 3600, 2)} seconds"
