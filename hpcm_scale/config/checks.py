"""Combinations that cannot work, refused before any process starts talking to another."""

from __future__ import annotations

from hpcm_scale.config.schema import Config, EngineName, Fusion, ModelConfig, ScheduleConfig
from hpcm_scale.errors import UserError


def check(config: Config, world_size: int) -> None:
    """Raise UserError, naming the key and the mend, for a configuration that cannot be trained."""
    check_model(config.model)
    _check_batch(config, world_size)
    _check_engine(config, world_size)
    _check_schedule(config.schedule)
    train, data, evaluation = config.train, config.data, config.eval
    multiple = side_multiple(config.model)
    if data.crop < multiple or data.crop % multiple:
        mend = max(multiple, round(data.crop / multiple) * multiple)
        raise UserError(
            f"data.crop={data.crop} does not fit model={config.model.name}, whose inputs are multiples "
            f"of {multiple} pixels; use data.crop={mend}"
        )
    for key, value in {
        "train.steps": train.steps,
        "train.batch_size": train.batch_size,
        "train.checkpoint_every": train.checkpoint_every,
        "train.keep_checkpoints": train.keep_checkpoints,
        "train.max_skipped": train.max_skipped,
        "eval.every": evaluation.every,
        "log.every": config.log.every,
        "data.retries": data.retries,
        "data.prefetch": data.prefetch,
    }.items():
        if value < 1:
            raise UserError(f"{key}={value} must be at least 1")
    for key, value in {"train.clip_norm": train.clip_norm, "objective.lmbda": config.objective.lmbda}.items():
        if not value > 0:
            raise UserError(f"{key}={value} must be greater than 0")
    if train.stop_after is not None and not 0 < train.stop_after <= train.steps:
        raise UserError(f"train.stop_after={train.stop_after} must lie between 1 and train.steps={train.steps}")
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise UserError(f"train.betas={train.betas} must be two numbers from 0 up to, not including, 1")
    if data.workers < 0:
        raise UserError(f"data.workers={data.workers} must be 0 or more")


def side_multiple(model: ModelConfig) -> int:
    """Sides of the model's input are multiples of this: 256 with window attention, else 128 pixels."""
    return 256 if model.fusion == Fusion.attention else 128


def micro_batch_size(config: Config, world_size: int) -> int:
    """Images per process and forward pass."""
    return config.train.micro_batch_size or config.train.batch_size // world_size


def accumulation(config: Config, world_size: int) -> int:
    """Forward passes per process and optimizer step."""
    return config.train.batch_size // (world_size * micro_batch_size(config, world_size))


def check_model(model: ModelConfig) -> None:
    """Raise UserError for a model that cannot be built."""
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
    widths = [*model.channels, model.latent_channels, model.hyper_channels]
    if not 1 <= model.partial_ratio <= min(widths):
        raise UserError(
            f"model.partial_ratio={model.partial_ratio} must lie between 1 and the smallest width, {min(widths)}"
        )


def _check_batch(config: Config, world_size: int) -> None:
    train = config.train
    if train.micro_batch_size is not None and train.micro_batch_size < 1:
        raise UserError(f"train.micro_batch_size={train.micro_batch_size} must be at least 1")
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
    if engine.name == EngineName.accelerate and engine.zero_stage:
        raise UserError("engine.name=accelerate does not shard; use engine=accelerate or engine.zero_stage=0")
    if engine.world_size not in (None, world_size):
        raise UserError(
            f"engine.world_size={engine.world_size}, but the launcher started {world_size} processes; "
            "leave the key out or start as many"
        )


def _check_schedule(schedule: ScheduleConfig) -> None:
    boundaries = schedule.boundaries
    if len(schedule.factors) != len(boundaries) + 1:
        raise UserError(
            f"schedule.factors has {len(schedule.factors)} entries for {len(boundaries)} "
            "schedule.boundaries; it needs one more than they are"
        )
    if sorted(boundaries) != list(boundaries) or any(boundary <= 0 for boundary in boundaries):
        raise UserError(f"schedule.boundaries={boundaries} must be positive and rise")
    if boundaries and boundaries[0] <= 1 < boundaries[-1]:
        raise UserError(f"schedule.boundaries={boundaries} mixes fractions (≤ 1) and steps (> 1); use one of the two")
    if not schedule.learning_rate > 0 or schedule.warmup < 0:
        raise UserError("schedule.learning_rate must be greater than 0 and schedule.warmup at least 0")
