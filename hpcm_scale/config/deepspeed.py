"""DeepSpeed's configuration: the dictionary generated from ours, and the checks of engine.options merged into it."""

from __future__ import annotations

from typing import Any, cast

from omegaconf import OmegaConf

from hpcm_scale.config.schema import EngineConfig, TrainConfig
from hpcm_scale.errors import UserError
from hpcm_scale.limits import Range, abbreviated

REDUCED_PARAMETERS = 50_000_000
"""Gradients that are reduced at a time; stages 1 and 2 keep two buffers of this size, stage 3 one."""
PREFETCHED_PARAMETERS = 50_000_000
"""Parameters that ZeRO-3 gathers ahead of their use."""
REUSE_DISTANCE = 200_000_000
"""ZeRO-3 keeps a layer gathered if its next use is fewer than this many parameters away.

The context model uses the same layers step after step; up to 180 million parameters (544m) lie between two uses. At
half the distance all of them would be gathered again at every step.
"""
LIVE_PARAMETERS = 250_000_000
"""Parameters that ZeRO-3 keeps gathered on a device before it stops prefetching."""
KEPT_PARAMETERS = 100_000
"""Tensors up to this size are not sharded: biases, depthwise kernels, channel scales. They are 558 of the 920 tensors
of 1b and 0.2 % of its parameters; each of them would cost a message."""
ZERO_SIZES = {
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
}
"""Options of DeepSpeed's ZeRO that are numbers of parameters."""
_GENERATED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "optimizer and schedule",
    "scheduler": "schedule",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
}
"""Keys of DeepSpeed that follow from ours."""
_SIZE = Range(least=0, most=1e15)
_OPTION = Range(least=-1e30, most=1e30)


def deepspeed_dictionary(
    engine: EngineConfig, train: TrainConfig, micro_batch_size: int, accumulation: int
) -> dict[str, Any]:
    """The configuration of `deepspeed.initialize`.

    Weights and gradients stay fp32: DeepSpeed's bf16 mode casts every parameter, which ruins an entropy model; bf16
    arithmetic is autocast inside the model. Our optimizer clips and guards in stage 0. The batch sizes are those of
    the first phase; DeepSpeed uses only the number of accumulation rounds, which is the same in all phases.
    """
    # DeepSpeed's default, 5e8, would take 4 GB of every device, whatever the size of the model.
    zero: dict[str, Any] = {"stage": engine.zero_stage, "reduce_bucket_size": REDUCED_PARAMETERS}
    if engine.zero_stage:
        zero["overlap_comm"] = True
    if engine.zero_stage in (1, 2):
        zero["contiguous_gradients"] = True
    if engine.zero_stage == 3:
        # DeepSpeed's defaults, 1e9, would keep the whole of the largest model gathered.
        zero |= {"stage3_max_live_parameters": LIVE_PARAMETERS, "stage3_max_reuse_distance": REUSE_DISTANCE}
        zero |= {"stage3_prefetch_bucket_size": PREFETCHED_PARAMETERS}
        zero |= {"stage3_param_persistence_threshold": KEPT_PARAMETERS}
    if engine.offload:
        zero |= {
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
        }
    dictionary = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.clip_norm if engine.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.merge(dictionary, engine.options)))


def check_options(options: dict[str, Any]) -> None:
    """Raise UserError for engine.options that DeepSpeed cannot use, or that override a key of ours."""
    for key in options:
        if key in _GENERATED:
            raise UserError(
                "generated-option",
                f"engine.options.{key}",
                f"engine.options.{key} is generated from {_GENERATED[key]}; set that instead",
            )
    _check_numbers(options, "engine.options")
    zero, prefix = options.get("zero_optimization", {}), "engine.options.zero_optimization"
    if not isinstance(zero, dict):
        raise UserError("zero-options-type", prefix, f"{prefix}={abbreviated(zero)} must be a dictionary of options")
    for key in ZERO_SIZES & zero.keys():
        value = zero[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                "zero-option-type", f"{prefix}.{key}", f"{prefix}.{key}={abbreviated(value)} must be a number"
            )
        _SIZE.check(f"{prefix}.{key}", value)
    if "stage" in zero:
        raise UserError(
            "generated-zero-stage",
            f"{prefix}.stage",
            f"{prefix}.stage is generated from engine.zero_stage; set that instead",
        )
    for key in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(key), dict) and zero[key].get("device") == "nvme":
            raise UserError(
                "nvme-offload",
                f"{prefix}.{key}.device",
                f"{prefix}.{key}.device=nvme keeps weights on a disk that checkpoints do not read; use cpu",
            )


def _check_numbers(options: Any, key: str) -> None:
    """Numbers at any depth."""
    if isinstance(options, dict | list):
        for name, value in options.items() if isinstance(options, dict) else enumerate(options):
            _check_numbers(value, f"{key}.{name}")
    elif isinstance(options, int | float):
        _OPTION.check(key, options)
