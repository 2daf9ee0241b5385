"""Checks of combinations of keys that cannot work; they run before any process group is initialized."""

from __future__ import annotations

import math

from hpcm_scale.config.deepspeed import check_options
from hpcm_scale.config.schema import (
    Config,
    DataConfig,
    Distortion,
    EngineConfig,
    EngineName,
    Fusion,
    ModelConfig,
    PreEditorConfig,
    RunConfig,
    ScheduleConfig,
    Target,
    TrainConfig,
)
from hpcm_scale.errors import UserError
from hpcm_scale.files import PIPE, check_no_secret
from hpcm_scale.limits import abbreviated, check_numbers

MS_SSIM_SMALLEST_SIDE = 161
"""Pixels. Five scales with four halvings and a window of 11 pixels: MS-SSIM is not defined for shorter sides."""
MS_SSIM_LEAST_LMBDA = 0.24
"""A tenth of the lowest public λ; the highest of MSE, 0.0483, is far below."""
_MOST_PIXELS = 10**10
"""Of one forward pass: more than any device holds the activations of."""


def check(config: Config, world_size: int) -> None:
    """Raise UserError, naming key and remedy, for a configuration that `world_size` processes cannot train."""
    check_numbers(config)
    _check_data(config.data)
    check_model(config.model)
    _check_batch(config.train, world_size)
    _check_engine(config.engine, world_size)
    _check_schedule(config.schedule, config.train.steps)
    _check_cooldown(config.run, config.train.steps)
    _check_vision_model(config)
    _check_distortion(config)
    _check_crops(config, world_size)
    _check_train(config.train)
    betas = config.optimizer.betas
    if len(betas) != 2:
        raise UserError(
            "betas-length", "optimizer.betas", f"optimizer.betas={betas} must be two numbers, such as [0.9,0.999]"
        )
    rate, lmbda = config.model.rate, config.objective.lmbda
    if rate.levels > 1 and not rate.lowest <= lmbda <= rate.highest:
        raise UserError(
            "lmbda-outside-rates",
            "objective.lmbda",
            f"objective.lmbda={lmbda:g}, used in evaluations while training, is outside "
            f"model.rate.lowest={rate.lowest:g} … highest={rate.highest:g}; choose a value in this range",
        )


def side_multiple(model: ModelConfig) -> int:
    """Sides of the model's input are multiples of this: 256 with window attention, else 128 pixels."""
    return 256 if model.fusion == Fusion.attention else 128


def micro_batch_size(train: TrainConfig, world_size: int) -> int:
    """Images per process and forward pass in the first phase."""
    return train.micro_batch_size or train.batch_size // world_size


def check_model(model: ModelConfig) -> None:
    """Raise UserError for a model that cannot be built; one with a `size` has no widths yet."""
    if model.size is not None:
        raise UserError(
            "unresolved-size",
            "model.size",
            f"model.size={model.size} has not been resolved to widths and depths; omit it, or set it on the command "
            "line",
        )
    check_numbers(model, "model.")
    lengths = {"channels": 3, "g_a_blocks": 4, "g_s_blocks": 4, "hyper_blocks": 2, "adaptor_blocks": 3}
    for key, length in lengths.items():
        value = getattr(model, key)
        if len(value) != length:
            raise UserError(
                "model-list-length", f"model.{key}", f"model.{key}={value} must be a list of {length} numbers"
            )
    latent, rate = model.latent_channels, model.rate
    if latent % 8:
        raise UserError(
            "latent-channels-multiple",
            "model.latent_channels",
            f"model.latent_channels={latent} must be a multiple of 8",
        )
    if model.fusion == Fusion.attention and 2 * latent % model.attention_heads:
        raise UserError(
            "attention-heads-divisor",
            "model.attention_heads",
            f"model.attention_heads={model.attention_heads} must divide 2 × model.latent_channels={latent}",
        )
    if model.context_channels is not None and any(model.adaptor_blocks):
        raise UserError(
            "adaptor-blocks-and-context-channels",
            "model.context_channels",
            f"model.context_channels={model.context_channels} needs adaptors of one 1×1 convolution; set "
            "model.adaptor_blocks=[0,0,0], or omit it",
        )
    if model.stem_kernel not in (2, 4):
        raise UserError("stem-kernel", "model.stem_kernel", f"model.stem_kernel={model.stem_kernel} must be 2 or 4")
    if rate.lowest >= rate.highest:
        raise UserError(
            "empty-rate-range",
            "model.rate.lowest",
            f"model.rate.lowest={rate.lowest:g} must be less than model.rate.highest={rate.highest:g}",
        )
    smallest = min(*model.channels, latent, model.hyper_channels)
    if model.partial_ratio > smallest:
        raise UserError(
            "partial-ratio-too-large",
            "model.partial_ratio",
            f"model.partial_ratio={model.partial_ratio} must be at most the smallest width, {smallest}",
        )


def check_pre_editor(editor: PreEditorConfig) -> None:
    """Raise UserError for a pre-editor that cannot be built."""
    check_numbers(editor, "machine.pre_editor.")
    if len(editor.channels) != 3:
        raise UserError(
            "pre-editor-channels",
            "machine.pre_editor.channels",
            f"machine.pre_editor.channels={editor.channels} must be three numbers",
        )


def _check_data(data: DataConfig) -> None:
    check_no_secret(str(data.shards), "data.shards")
    sets = data.sets
    if any(each.path.startswith(PIPE) for each in sets):
        if not data.pipe:
            raise UserError(
                "pipe-not-allowed",
                "data.pipe",
                f"data.shards={PIPE}… runs a shell command; set data.pipe=true to allow it",
            )
        if data.cache is None:
            raise UserError(
                "pipe-without-cache", "data.cache", f"data.shards={PIPE}… needs a cache; set data.cache to a folder"
            )
    if sets and not any(each.weight != 0 for each in sets):
        raise UserError(
            "zero-weights", "data.shards", "the weights of data.shards are all 0; give at least one set a weight"
        )


def _check_batch(train: TrainConfig, world_size: int) -> None:
    share = world_size * (train.micro_batch_size or 1)
    if train.batch_size % share:
        unit = f"{world_size} processes"
        if train.micro_batch_size:
            unit += f" × train.micro_batch_size={train.micro_batch_size}"
        near = max(share, round(train.batch_size / share) * share)
        raise UserError(
            "indivisible-batch",
            "train.batch_size",
            f"train.batch_size={train.batch_size} is not divisible by {unit}; use train.batch_size={near}",
        )


def _check_train(train: TrainConfig) -> None:
    if train.stop_after is not None and train.stop_after > train.steps:
        raise UserError(
            "stop-after-end",
            "train.stop_after",
            f"train.stop_after={train.stop_after} must be between 1 and train.steps={train.steps}",
        )
    if not all(step <= train.steps for step in train.keep_at):
        raise UserError(
            "keep-after-end",
            "train.keep_at",
            f"train.keep_at={train.keep_at} must be steps between 1 and train.steps={train.steps}",
        )
    profiled = train.profile_steps
    if profiled and not (len(profiled) == 2 and profiled[0] < profiled[1] <= train.steps):
        raise UserError(
            "profile-steps",
            "train.profile_steps",
            f"train.profile_steps={abbreviated(profiled)} must be two ascending steps between 1 and "
            f"train.steps={train.steps}, the first and the last one to profile, such as [100,103]",
        )
    if len(set(train.ema)) < len(train.ema):
        raise UserError("duplicate-ema", "train.ema", f"train.ema={train.ema} lists a length twice; list it once")


def _check_engine(engine: EngineConfig, world_size: int) -> None:
    if engine.offload and engine.zero_stage != 3:
        raise UserError(
            "offload-stage", "engine.offload", f"engine.offload needs engine.zero_stage=3, not {engine.zero_stage}"
        )
    if engine.compile and engine.zero_stage == 3:
        raise UserError(
            "compiled-shards",
            "engine.compile",
            "engine.compile does not support the sharded weights of engine.zero_stage=3; use engine=zero2 or "
            "engine.compile=false",
        )
    if engine.name == EngineName.accelerate and engine.zero_stage:
        raise UserError(
            "accelerate-stage",
            "engine.zero_stage",
            f"engine.name=accelerate does not shard, but engine.zero_stage={engine.zero_stage}; set "
            f"engine.zero_stage=0, or use engine=zero{engine.zero_stage}",
        )
    if engine.name == EngineName.accelerate and engine.options:
        raise UserError(
            "accelerate-options",
            "engine.options",
            "engine.options apply only to DeepSpeed; omit them with engine=accelerate",
        )
    check_options(engine.options)
    if engine.world_size not in (None, world_size):
        raise UserError(
            "other-world-size",
            "engine.world_size",
            f"engine.world_size={engine.world_size}, but the launcher started {world_size} processes; omit the key, "
            "or start that many",
        )


def _check_cooldown(run: RunConfig, steps: int) -> None:
    if (run.cooldown_of is None) != (run.cooldown_at is None):
        raise UserError(
            "incomplete-cooldown",
            "run.cooldown_of",
            "run.cooldown_of and run.cooldown_at belong together; start cooldowns with `hpcm cooldown`",
        )
    if run.cooldown_at is not None and run.cooldown_at >= steps:
        raise UserError(
            "cooldown-at-end",
            "run.cooldown_at",
            f"run.cooldown_at={run.cooldown_at} must be less than train.steps={steps}; raise train.steps",
        )


def _check_vision_model(config: Config) -> None:
    machine, target = config.machine, config.objective.target
    for key in ("edit", "freeze_codec"):
        if getattr(machine, key) and target != Target.vision_model:
            raise UserError(
                "human-target", f"machine.{key}", f"machine.{key} needs objective.target=vision_model; set it as well"
            )
    if target != Target.vision_model:
        return
    if not machine.receivers:
        raise UserError(
            "no-receivers",
            "machine.receivers",
            "objective.target=vision_model needs machine.receivers; list vision models, such as [efficientnet-lite0]",
        )
    if machine.freeze_codec and not machine.edit:
        raise UserError(
            "nothing-to-train",
            "machine.freeze_codec",
            "machine.freeze_codec without machine.edit=true trains no parameters; set machine.edit=true",
        )
    if machine.freeze_codec and config.init_from is None:
        raise UserError(
            "no-frozen-codec",
            "init_from",
            "machine.freeze_codec needs a trained codec; set init_from to its run folder",
        )
    if len(set(machine.receivers)) < len(machine.receivers):
        raise UserError(
            "duplicate-receivers",
            "machine.receivers",
            f"machine.receivers={machine.receivers} lists a receiver twice; list it once",
        )
    if not (machine.mse or machine.token_distortion_weight or machine.token_rank_weight):
        raise UserError(
            "no-distortion",
            "machine.mse",
            "machine.mse, machine.token_distortion_weight and machine.token_rank_weight are all 0; give one of them a "
            "weight",
        )
    check_pre_editor(machine.pre_editor)
    tokens = machine.pre_editor.tokens
    if machine.edit and tokens not in (None, *machine.receivers):
        raise UserError(
            "unknown-pre-editor-receiver",
            "machine.pre_editor.tokens",
            f"machine.pre_editor.tokens={tokens} is not among machine.receivers={machine.receivers}; choose one of "
            "them, or null",
        )


def _check_distortion(config: Config) -> None:
    objective, rate = config.objective, config.model.rate
    if objective.distortion != Distortion.ms_ssim:
        return
    if objective.target == Target.vision_model:
        raise UserError(
            "ms-ssim-for-vision-model",
            "objective.distortion",
            "objective.target=vision_model weighs tokens against MSE (machine.mse), not "
            "objective.distortion=ms_ssim; omit one of the two",
        )
    if rate.levels > 1 and min(rate.lowest, rate.highest, rate.reference) < MS_SSIM_LEAST_LMBDA:
        raise UserError(
            "mse-rates-with-ms-ssim",
            "model.rate",
            f"model.rate.lowest={rate.lowest:g}, highest={rate.highest:g} and reference={rate.reference:g} are not all "
            "λ of MS-SSIM, which objective.distortion=ms_ssim needs; use model.rate.lowest=2.4 model.rate.highest=60.5 "
            f"model.rate.reference={max(objective.lmbda, 2.4):g}",
        )
    if objective.lmbda < MS_SSIM_LEAST_LMBDA:
        raise UserError(
            "mse-lmbda-with-ms-ssim",
            "objective.lmbda",
            f"objective.lmbda={objective.lmbda:g} is a λ of MSE, too small for objective.distortion=ms_ssim; use 2.4 "
            "to 60.5, or objective=ms_ssim, which sets it",
        )
    for key, sides in (("data.crop", [config.data.crop]), ("schedule.crops", config.schedule.crops)):
        if min(sides, default=MS_SSIM_SMALLEST_SIDE) < MS_SSIM_SMALLEST_SIDE:
            raise UserError(
                "ms-ssim-crop",
                key,
                f"objective.distortion=ms_ssim needs crops with sides of at least {MS_SSIM_SMALLEST_SIDE} pixels, but "
                f"{key} has {min(sides)}; use 256",
            )


def _check_schedule(schedule: ScheduleConfig, steps: int) -> None:
    if not schedule.decay <= max(steps, 1):
        raise UserError(
            "decay-too-long",
            "schedule.decay",
            f"schedule.decay={schedule.decay:g} is longer than train.steps={steps}; give a fraction of the run, or "
            "fewer steps",
        )
    boundaries = schedule.boundaries
    if len(schedule.factors) != len(boundaries) + 1:
        raise UserError(
            "factors-length",
            "schedule.factors",
            f"schedule.factors has {len(schedule.factors)} entries for {len(boundaries)} schedule.boundaries; it needs "
            "one more",
        )
    _check_boundaries("schedule.boundaries", boundaries, mixed=bool(boundaries) and boundaries[0] <= 1 < boundaries[-1])
    boundaries = schedule.crop_boundaries
    if len(schedule.crops) != len(boundaries):
        raise UserError(
            "crop-boundaries-length",
            "schedule.crop_boundaries",
            f"schedule.crops has {len(schedule.crops)} entries and schedule.crop_boundaries {len(boundaries)}; give "
            "one boundary for each crop",
        )
    mixed = bool(boundaries) and boundaries[0] < 1 <= boundaries[-1]
    _check_boundaries("schedule.crop_boundaries", boundaries, mixed)


def _check_boundaries(key: str, boundaries: list[float], mixed: bool) -> None:
    if sorted(boundaries) != list(boundaries):
        raise UserError("descending-boundaries", key, f"{key}={boundaries} must be ascending")
    if mixed:
        raise UserError(
            "mixed-boundaries", key, f"{key}={boundaries} mixes fractions of the run and steps; use one of the two"
        )


def _check_crops(config: Config, world_size: int) -> None:
    crop, crops, multiple = config.data.crop, config.schedule.crops, side_multiple(config.model)
    for key, side in (("data.crop", crop), *(("schedule.crops", side) for side in crops)):
        if side < multiple or side % multiple:
            near = max(multiple, round(side / multiple) * multiple)
            raise UserError(
                "crop-multiple",
                key,
                f"{key} has a side of {side} pixels, but model={config.model.name} needs multiples of {multiple}; use "
                f"{'data.crop=' if key == 'data.crop' else ''}{near}",
            )
    images = micro_batch_size(config.train, world_size)
    unit = math.lcm(*(side**2 // math.gcd(side**2, crop**2) for side in crops))
    if images % unit:
        near = max(unit, round(images / unit) * unit)
        accumulating = config.train.micro_batch_size is not None
        key, value = ("train.micro_batch_size", near) if accumulating else ("train.batch_size", near * world_size)
        raise UserError(
            "crop-pixels",
            key,
            f"schedule.crops={crops} must keep the number of pixels of a forward pass, but {images} crops of {crop}² "
            f"are not a multiple of {unit}; use {key}={value}",
        )
    if images * crop**2 > _MOST_PIXELS:
        raise UserError(
            "too-many-pixels",
            "train.micro_batch_size",
            f"{images:,} images with data.crop={crop} are more than {_MOST_PIXELS:,} pixels of a forward pass; lower "
            "train.micro_batch_size",
        )
