"""DeepSpeed's configuration dictionary, generated from ours."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from hpcm_scale.config.checks import accumulation, micro_batch_size
from hpcm_scale.config.schema import Config

REDUCED_PARAMETERS = 50_000_000
"""Gradients that the processes add up at a time; stages 1 and 2 keep two buffers of this size, stage 3 one."""
PREFETCHED_PARAMETERS = 50_000_000
"""Parameters that ZeRO-3 gathers ahead of their use."""
REUSE_DISTANCE = 200_000_000
"""ZeRO-3 keeps a layer that is used again before so many other parameters are.

The context model walks through the same layers step after step; up to 180 million parameters (544m) lie between two
uses of one of them. At half the distance all of them would be gathered anew at every step.
"""
LIVE_PARAMETERS = 250_000_000
"""Parameters that ZeRO-3 keeps gathered on a device at a time before it stops fetching ahead."""
KEPT_PARAMETERS = 100_000
"""Tensors up to this size every process keeps whole: biases, depthwise kernels, channel scales. They are 558 of the
920 tensors of 1b and 0.2 % of its parameters; gathered one by one, each would cost a message."""


def deepspeed_dictionary(config: Config, world_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    Weights and gradients stay fp32: DeepSpeed's bf16 mode casts every parameter, which ruins an entropy
    model; bf16 arithmetic is autocast inside the model. Stage 0 clips and guards in our optimizer. The batch sizes are
    those of the first phase: of them DeepSpeed uses the number of accumulation rounds alone, the same in all phases.
    """
    engine = config.engine
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
        "train_batch_size": config.train.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size(config, world_size),
        "gradient_accumulation_steps": accumulation(config, world_size),
        "gradient_clipping": config.train.clip_norm if engine.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    return OmegaConf.to_container(OmegaConf.merge(dictionary, engine.options))
