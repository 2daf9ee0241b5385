"""Combinations that cannot work, refused before any process starts talking to another."""

from __future__ import annotations

from typing import Any

from hpcm_scale.config.phases import Phase, check_crops
from hpcm_scale.config.schema import (
    Config,
    DataConfig,
    Distortion,
    EngineName,
    Fusion,
    ModelConfig,
    PreEditorConfig,
    ScheduleConfig,
    Target,
)
from hpcm_scale.errors import UserError
from hpcm_scale.files import PIPE, check_no_secret
from hpcm_scale.limits import Range, abbreviated, check_numbers

# What a distortion asks of crops and λ.


MS_SSIM_SMALLEST_SIDE = 161
"""Pixels. Five scales, four halvings apart, and a window of 11 pixels: MS-SSIM is not defined for shorter sides."""
MS_SSIM_LEAST_LMBDA = 0.24
"""A tenth of the lowest public λ; the highest of MSE, 0.0483, is far below."""


def check_distortion(config: Config) -> None:
    """Raise UserError for an objective.distortion that does not go with the rest."""
    objective, rate = config.objective, config.model.rate
    if objective.distortion != Distortion.ms_ssim:
        return
    if objective.target == Target.vision_model:
        raise UserError(
            "objective.target=vision_model weighs tokens against MSE (machine.mse), not objective.distortion=ms_ssim; "
            "leave one of the two out"
        )
    if rate.levels > 1 and min(rate.lowest, rate.highest, rate.reference) < MS_SSIM_LEAST_LMBDA:
        raise UserError(
            f"model.rate.lowest={rate.lowest:g}, highest={rate.highest:g} and reference={rate.reference:g} are not all "
            "λ of MS-SSIM, which objective.distortion=ms_ssim needs; use model.rate.lowest=2.4 model.rate.highest=60.5 "
            f"model.rate.reference={max(objective.lmbda, 2.4):g}"
        )
    if objective.lmbda < MS_SSIM_LEAST_LMBDA:
        raise UserError(
            f"objective.lmbda={objective.lmbda:g} is λ of MSE, and with objective.distortion=ms_ssim it would buy no "
            "picture; use 2.4 to 60.5, or objective=ms_ssim, which brings its own"
        )
    for side in (config.data.crop, *config.schedule.crops):
        if side < MS_SSIM_SMALLEST_SIDE:
            key = "data.crop" if side == config.data.crop else "schedule.crops"
            raise UserError(
                f"objective.distortion=ms_ssim needs crops with sides from {MS_SSIM_SMALLEST_SIDE} pixels, and {key} "
                f"has {side}; use 256"
            )


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


ZERO_SIZES = {
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
}
"""Numbers of parameters among the options of DeepSpeed's ZeRO."""
_SIZE = Range(least=0, most=1e15)
_OPTION = Range(least=-1e30, most=1e30)
_MOST_PIXELS = 10**10
"""Of one forward pass: more than any device holds the activations of."""


def check(config: Config, world_size: int) -> None:
    """Raise UserError, naming the key and the mend, for a configuration that cannot be trained."""
    check_numbers(config)
    _check_source(config.data)
    check_model(config.model)
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
    images = micro_batch_size(config, world_size)
    check_crops(config, multiple, images, world_size)
    if images * data.crop**2 > _MOST_PIXELS:
        raise UserError(
            f"{images:,} images with data.crop={data.crop} are more than {_MOST_PIXELS:,} pixels of a forward pass; "
            "lower train.micro_batch_size"
        )
    if train.stop_after is not None and train.stop_after > train.steps:
        raise UserError(f"train.stop_after={train.stop_after} must lie between 1 and train.steps={train.steps}")
    if not all(step <= train.steps for step in train.keep_at):
        raise UserError(f"train.keep_at={train.keep_at} must be steps between 1 and train.steps={train.steps}")
    profiled = train.profile_steps
    if profiled and not (len(profiled) == 2 and profiled[0] < profiled[1] <= train.steps):
        raise UserError(
            f"train.profile_steps={abbreviated(profiled)} must be two ascending steps between 1 and "
            f"train.steps={train.steps}, the first and the last one to profile, such as [100,103]"
        )
    if len(train.betas) != 2:
        raise UserError(f"train.betas={train.betas} must be two numbers")
    if len(set(train.ema)) < len(train.ema):
        raise UserError(f"train.ema={train.ema} must be different lengths")


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
    if weights and not any(weights):
        raise UserError(f"data.weights={weights} are all 0; give one of the sets a weight")


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
    check_numbers(model, "model.")
    lengths = {"channels": 3, "g_a_blocks": 4, "g_s_blocks": 4, "hyper_blocks": 2, "adaptor_blocks": 3}
    for key, length in lengths.items():
        if len(getattr(model, key)) != length:
            raise UserError(f"model.{key}={getattr(model, key)} must be a list of {length} numbers")
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
    if rate.lowest >= rate.highest:
        raise UserError(f"model.rate.lowest={rate.lowest:g} must be less than model.rate.highest={rate.highest:g}")
    smallest = min(*model.channels, model.latent_channels, model.hyper_channels)
    if model.partial_ratio > smallest:
        raise UserError(f"model.partial_ratio={model.partial_ratio} must be at most the smallest width, {smallest}")


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
    _check_options(engine.options, "engine.options")
    _check_zero_options(engine.options.get("zero_optimization", {}))
    if engine.world_size not in (None, world_size):
        raise UserError(
            f"engine.world_size={engine.world_size}, but the launcher started {world_size} processes; "
            "leave the key out or start as many"
        )


def _check_options(options: Any, key: str) -> None:
    """The numbers of DeepSpeed's own options, at any depth."""
    if isinstance(options, dict | list):
        for name, value in options.items() if isinstance(options, dict) else enumerate(options):
            _check_options(value, f"{key}.{name}")
    elif isinstance(options, int | float):
        _OPTION.check(key, options)


def _check_zero_options(options: Any) -> None:
    if not isinstance(options, dict):
        raise UserError(f"engine.options.zero_optimization={abbreviated(options)} must be a dictionary of options")
    for key in ZERO_SIZES & options.keys():
        value = options[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"engine.options.zero_optimization.{key}={abbreviated(value)} must be a number")
        _SIZE.check(f"engine.options.zero_optimization.{key}", value)
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
    trunk, step = config.run.cooldown_of, config.run.cooldown_at
    if (trunk is None) != (step is None):
        raise UserError("run.cooldown_of and run.cooldown_at belong together; start branches with `hpcm cooldown`")
    if step is not None and step >= config.train.steps:
        raise UserError(
            f"run.cooldown_at={step} leaves nothing of train.steps={config.train.steps}; ask for more steps than that"
        )


def _check_machine(config: Config) -> None:
    machine, target = config.machine, config.objective.target
    editor = machine.pre_editor
    for key in ("edit", "freeze_codec"):
        if getattr(machine, key) and target != Target.vision_model:
            raise UserError(f"machine.{key} needs objective.target=vision_model; set that, too")
    if target != Target.vision_model:
        return
    if not machine.receivers:
        raise UserError(
            "objective.target=vision_model needs machine.receivers; name the networks that see the images, such as "
            "[efficientnet-lite0]"
        )
    if machine.freeze_codec and not machine.edit:
        raise UserError("machine.freeze_codec leaves nothing to train without machine.edit=true")
    if machine.freeze_codec and config.init_from is None:
        raise UserError("machine.freeze_codec needs a trained codec; name its run folder with init_from")
    if len(set(machine.receivers)) < len(machine.receivers):
        raise UserError(f"machine.receivers={machine.receivers} names one twice; name each once")
    if not (machine.mse or machine.token_distortion_weight or machine.token_rank_weight):
        raise UserError(
            "machine.mse, machine.token_distortion_weight and machine.token_rank_weight are all 0; give one of them "
            "a weight"
        )
    check_pre_editor(editor)
    if machine.edit and editor.tokens not in (None, *machine.receivers):
        raise UserError(
            f"machine.pre_editor.tokens={editor.tokens} is not among machine.receivers={machine.receivers}; name one "
            "of them, or null"
        )


def check_pre_editor(editor: PreEditorConfig) -> None:
    """Raise UserError for a pre-editor that cannot be built."""
    check_numbers(editor, "machine.pre_editor.")
    if len(editor.channels) != 3:
        raise UserError(f"machine.pre_editor.channels={editor.channels} must be three numbers")


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
    if sorted(boundaries) != list(boundaries):
        raise UserError(f"schedule.boundaries={boundaries} must rise")
    if boundaries and boundaries[0] <= 1 < boundaries[-1]:
        raise UserError(f"schedule.boundaries={boundaries} mixes fractions (≤ 1) and steps (> 1); use one of the two")
