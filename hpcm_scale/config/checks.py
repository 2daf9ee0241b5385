"""Combinations that cannot work, refused before any process starts talking to another."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Any

from hpcm_scale.config.distortions import check_distortion
from hpcm_scale.config.phases import Phase, check_crops
from hpcm_scale.config.schema import (
    Config,
    DataConfig,
    EngineName,
    Fusion,
    ModelConfig,
    PreEditorConfig,
    ScheduleConfig,
    Viewer,
)
from hpcm_scale.config.urls import PIPE, check_no_secret
from hpcm_scale.errors import UserError

# The smallest value of each key that counts something; unset optional keys pass.
_LEAST = {
    "machine.mse": 0,
    "machine.token": 0,
    "machine.rank": 0,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.micro_batch_size": 1,
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": 1,
    "train.max_skipped": 1,
    "train.max_rollbacks": 0,
    "train.keep_every": 1,
    "train.seed": 0,
    "eval.every": 1,
    "eval.limit": 1,
    "log.every": 1,
    "log.images": 0,
    "data.retries": 1,
    "data.prefetch": 1,
    "data.workers": 0,
    "data.max_bad": 0,
    "schedule.warmup": 0,
    "schedule.decay": 0,
    "run.branch_at": 1,
    "engine.world_size": 1,
}
_POSITIVE = (
    "train.clip_norm",
    "train.spike",
    "train.max_hours",
    "train.stall_minutes",
    "engine.join_minutes",
    "objective.lmbda",
    "schedule.learning_rate",
    "data.timeout",
)
_MODEL_LEAST = {
    "channels": 1,
    "latent_channels": 8,
    "hyper_latent_channels": 1,
    "hyper_channels": 1,
    "g_a_blocks": 0,
    "g_s_blocks": 0,
    "hyper_blocks": 0,
    "prior_s1_s2.before": 0,
    "prior_s1_s2.after": 0,
    "prior_s1_s2.refine": 0,
    "prior_s3.before": 0,
    "prior_s3.after": 0,
    "prior_s3.refine": 0,
    "adaptor_blocks": 0,
    "attention_heads": 1,
    "expansion": 1,
    "rate.levels": 1,
}
# What a key of DeepSpeed's own, given in engine.options, would set behind the back of a key of ours.
_GENERATED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "train.betas and schedule",
    "scheduler": "schedule",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
}


MOST_LEVELS = 256
LONGEST_AVERAGE = 12**-0.5
"""Limit of train.ema: relative standard deviation of the flat profile, in which all weights so far count alike."""


def check(config: Config, world_size: int) -> None:
    """Raise UserError, naming the key and the mend, for a configuration that cannot be trained."""
    _check_source(config.data)
    check_model(config.model)
    for key, least in _LEAST.items():
        value = attrgetter(key)(config)
        if value is not None and value < least:
            raise UserError(f"{key}={value} must be at least {least}")
    for key in _POSITIVE:
        value = attrgetter(key)(config)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{key}={value} must be greater than 0, and finite")
    _check_batch(config, world_size)
    _check_engine(config, world_size)
    _check_schedule(config.schedule, config.train.steps)
    _check_branch(config)
    _check_machine(config)
    check_distortion(config)
    rate, lmbda = config.model.rate, config.objective.lmbda
    if rate.levels > 1 and not rate.lowest <= lmbda <= rate.highest:
        raise UserError(
            f"objective.lmbda={lmbda:g}, at which the model is evaluated while it trains, lies outside of "
            f"model.rate.lowest={rate.lowest:g} … highest={rate.highest:g}; choose one within"
        )
    train, data = config.train, config.data
    multiple = side_multiple(config.model)
    if data.crop < multiple or data.crop % multiple:
        mend = max(multiple, round(data.crop / multiple) * multiple)
        raise UserError(
            f"data.crop={data.crop} does not fit model={config.model.name}, whose inputs are multiples "
            f"of {multiple} pixels; use data.crop={mend}"
        )
    check_crops(config, multiple, micro_batch_size(config, world_size), world_size)
    if train.stop_after is not None and not 0 < train.stop_after <= train.steps:
        raise UserError(f"train.stop_after={train.stop_after} must lie between 1 and train.steps={train.steps}")
    if not all(0 < step <= train.steps for step in train.keep_at):
        raise UserError(f"train.keep_at={train.keep_at} must be steps between 1 and train.steps={train.steps}")
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise UserError(f"train.betas={train.betas} must be two numbers from 0 up to, not including, 1")
    if not all(0 < length < LONGEST_AVERAGE for length in train.ema) or len(set(train.ema)) < len(train.ema):
        raise UserError(
            f"train.ema={train.ema} must be different lengths between 0 and {LONGEST_AVERAGE:.4f} (1/√12: all weights "
            "so far count alike)"
        )


def _check_source(data: DataConfig) -> None:
    sources = [("data.shards", data.shards or ""), *(("data.more_shards", shards) for shards in data.more_shards)]
    for key, shards in sources:
        check_no_secret(shards, key)
        if shards.startswith(PIPE) and not data.pipe:
            raise UserError(f"{key}={PIPE}… runs a shell command; set data.pipe=true if that is meant")
        if shards.startswith(PIPE) and data.cache is None:
            raise UserError(f"{key}={PIPE}… gives whole shards; set data.cache to a folder that keeps them")
    weights = data.weights
    if weights and len(weights) != len(sources):
        raise UserError(
            f"data.weights has {len(weights)} entries for {len(sources)} sets, data.shards and each of "
            "data.more_shards; give one for each, or none"
        )
    if weights and not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
        raise UserError(f"data.weights={weights} must be 0 or greater, and finite, and one greater than 0")
    if not 0 < data.downscale <= 1:
        raise UserError(f"data.downscale={data.downscale} must be greater than 0, and at most 1")


def side_multiple(model: ModelConfig) -> int:
    """Sides of the model's input are multiples of this: 256 with window attention, else 128 pixels."""
    return 256 if model.fusion == Fusion.attention else 128


def micro_batch_size(config: Config, world_size: int, phase: Phase | None = None) -> int:
    """Images per process and forward pass; in a `phase` with other crops, so many that it has as many pixels."""
    images = config.train.micro_batch_size or config.train.batch_size // world_size
    return images * phase.batch_size // config.train.batch_size if phase else images


def accumulation(config: Config, world_size: int) -> int:
    """Forward passes per process and optimizer step, the same in all phases."""
    return config.train.batch_size // (world_size * micro_batch_size(config, world_size))


def check_model(model: ModelConfig) -> None:
    """Raise UserError for a model that cannot be built; one that still has a `size` has no widths yet."""
    if model.size is not None:
        raise UserError(
            f"model.size={model.size} has not become widths and depths; leave it out, or give it on the command line"
        )
    lengths = {"channels": 3, "g_a_blocks": 4, "g_s_blocks": 4, "hyper_blocks": 2, "adaptor_blocks": 3}
    for key, length in lengths.items():
        if len(getattr(model, key)) != length:
            raise UserError(f"model.{key}={getattr(model, key)} must be a list of {length} numbers")
    for key, least in _MODEL_LEAST.items():
        value = attrgetter(key)(model)
        if min(value if isinstance(value, list) else [value]) < least:
            raise UserError(f"model.{key}={value} must be at least {least}")
    if model.latent_channels % 8:
        raise UserError(f"model.latent_channels={model.latent_channels} must be a multiple of 8")
    if model.fusion == Fusion.attention and 2 * model.latent_channels % model.attention_heads:
        raise UserError(
            f"model.attention_heads={model.attention_heads} must divide twice "
            f"model.latent_channels={model.latent_channels}"
        )
    if model.stem_kernel not in (2, 4):
        raise UserError(f"model.stem_kernel={model.stem_kernel} must be 2 or 4")
    rate = model.rate
    if rate.levels > MOST_LEVELS:
        raise UserError(
            f"model.rate.levels={rate.levels} is more than a file's byte tells apart, {MOST_LEVELS}; choose fewer"
        )
    if not 0 < rate.lowest < rate.highest < math.inf or not 0 < rate.reference < math.inf:
        raise UserError(
            f"model.rate.lowest={rate.lowest:g}, highest={rate.highest:g} and reference={rate.reference:g} must be λ "
            "greater than 0, the lowest below the highest"
        )
    widths = [*model.channels, model.latent_channels, model.hyper_channels]
    if not 1 <= model.partial_ratio <= min(widths):
        raise UserError(
            f"model.partial_ratio={model.partial_ratio} must lie between 1 and the smallest width, {min(widths)}"
        )


def _check_batch(config: Config, world_size: int) -> None:
    train = config.train
    share = world_size * (train.micro_batch_size or 1)
    if train.batch_size % share:
        unit = f"{world_size} processes"
        if train.micro_batch_size:
            unit += f" × train.micro_batch_size={train.micro_batch_size}"
        near = max(share, round(train.batch_size / share) * share)
        raise UserError(f"train.batch_size={train.batch_size} does not divide over {unit}; use train.batch_size={near}")


def _check_engine(config: Config, world_size: int) -> None:
    engine = config.engine
    if engine.zero_stage not in range(4):
        raise UserError(f"engine.zero_stage={engine.zero_stage} must be 0, 1, 2 or 3")
    if engine.offload and engine.zero_stage != 3:
        raise UserError(f"engine.offload needs engine.zero_stage=3, not {engine.zero_stage}")
    if engine.compile and engine.zero_stage == 3:
        raise UserError(
            "engine.compile needs whole weights, and engine.zero_stage=3 shards them; use engine=zero2, or "
            "engine.compile=false"
        )
    if engine.name == EngineName.accelerate and engine.zero_stage:
        raise UserError("engine.name=accelerate does not shard; use engine=accelerate or engine.zero_stage=0")
    if engine.name == EngineName.accelerate and engine.options:
        raise UserError("engine.options are DeepSpeed's; leave them out with engine=accelerate")
    for key in engine.options:
        if key in _GENERATED:
            raise UserError(f"engine.options.{key} is generated from {_GENERATED[key]}; set that instead")
    zero = engine.options.get("zero_optimization")
    if isinstance(zero, dict):
        _check_zero_options(zero)
    if engine.world_size not in (None, world_size):
        raise UserError(
            f"engine.world_size={engine.world_size}, but the launcher started {world_size} processes; "
            "leave the key out or start as many"
        )


def _check_zero_options(options: dict[str, Any]) -> None:
    if "stage" in options:
        raise UserError("engine.options.zero_optimization.stage is generated from engine.zero_stage; set that instead")
    for key in ("offload_optimizer", "offload_param"):
        where = options.get(key)
        if isinstance(where, dict) and where.get("device") == "nvme":
            raise UserError(
                f"engine.options.zero_optimization.{key}.device=nvme keeps weights where checkpoints do not find them; "
                "use cpu"
            )


def _check_branch(config: Config) -> None:
    trunk, step = config.run.branch_of, config.run.branch_at
    if (trunk is None) != (step is None):
        raise UserError("run.branch_of and run.branch_at belong together; start branches with `hpcm branch`")
    if step is not None and step >= config.train.steps:
        raise UserError(
            f"run.branch_at={step} leaves nothing of train.steps={config.train.steps}; ask for more steps than that"
        )


def _check_machine(config: Config) -> None:
    machine, viewer = config.machine, config.objective.viewer
    editor = machine.pre_editor
    for key in ("edit", "freeze_codec"):
        if getattr(machine, key) and viewer != Viewer.machine:
            raise UserError(f"machine.{key} needs objective.viewer=machine; set that, too")
    if viewer != Viewer.machine:
        return
    if not machine.receivers:
        raise UserError(
            "objective.viewer=machine needs machine.receivers; name the networks that look at the pictures, such as "
            "[efficientnet-lite0]"
        )
    if machine.freeze_codec and not machine.edit:
        raise UserError("machine.freeze_codec leaves nothing to train without machine.edit=true")
    if machine.freeze_codec and config.init_from is None:
        raise UserError("machine.freeze_codec needs a trained codec; name its run folder with init_from")
    if len(set(machine.receivers)) < len(machine.receivers):
        raise UserError(f"machine.receivers={machine.receivers} names one twice; name each once")
    if not (machine.mse or machine.token or machine.rank):
        raise UserError("machine.mse, machine.token and machine.rank are all 0; give one of them a weight")
    check_pre_editor(editor)
    if machine.edit and editor.tokens not in (None, *machine.receivers):
        raise UserError(
            f"machine.pre_editor.tokens={editor.tokens} is not among machine.receivers={machine.receivers}; name one "
            "of them, or null"
        )


def check_pre_editor(editor: PreEditorConfig) -> None:
    """Raise UserError for a pre-editor that cannot be built."""
    if len(editor.channels) != 3 or min(editor.channels) < 4 or editor.blocks < 0:
        raise UserError(
            f"machine.pre_editor.channels={editor.channels} must be three numbers from 4 and "
            f"machine.pre_editor.blocks={editor.blocks} at least 0"
        )


def _check_schedule(schedule: ScheduleConfig, steps: int) -> None:
    if not schedule.decay <= max(steps, 1):
        raise UserError(
            f"schedule.decay={schedule.decay:g} is longer than train.steps={steps}; give a fraction of the run, or "
            "fewer steps"
        )
    boundaries = schedule.boundaries
    if len(schedule.factors) != len(boundaries) + 1:
        raise UserError(
            f"schedule.factors has {len(schedule.factors)} entries for {len(boundaries)} "
            "schedule.boundaries; it needs one more than they are"
        )
    if sorted(boundaries) != list(boundaries) or not all(boundary > 0 for boundary in boundaries):
        raise UserError(f"schedule.boundaries={boundaries} must be positive and rise")
    if boundaries and boundaries[0] <= 1 < boundaries[-1]:
        raise UserError(f"schedule.boundaries={boundaries} mixes fractions (≤ 1) and steps (> 1); use one of the two")
    if not all(0 <= factor < math.inf for factor in schedule.factors):
        raise UserError(f"schedule.factors={schedule.factors} must be 0 or greater, and finite")
