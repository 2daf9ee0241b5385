"""DeepSpeed's configuration dictionary, generated from ours."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from hpcm_scale.config.checks import accumulation, micro_batch_size
from hpcm_scale.config.schema import Config

LIVE_PARAMETERS = 100_000_000
"""Parameters that ZeRO-3 keeps gathered on a device at a time."""
PREFETCHED_PARAMETERS = 50_000_000
"""Parameters that ZeRO-3 gathers ahead of their use."""
REDUCED_PARAMETERS = 50_000_000
"""Gradients that the processes add up at a time; stages 1 and 2 keep two buffers of this size, stage 3 one."""


def deepspeed_dictionary(config: Config, world_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    Weights and gradients stay fp32: DeepSpeed's bf16 mode casts every parameter, which ruins an entropy
    model; bf16 arithmetic is autocast inside the model. Stage 0 clips and guards in our optimizer.
    """
    engine = config.engine
    # DeepSpeed's default, 5e8, would take 4 GB of every device, whatever the size of the model.
    zero: dict[str, Any] = {"stage": engine.zero_stage, "reduce_bucket_size": REDUCED_PARAMETERS}
    if engine.zero_stage in (1, 2):
        zero |= {"overlap_comm": True, "contiguous_gradients": True}
    if engine.zero_stage == 3:
        # DeepSpeed's defaults, 1e9, would keep the whole of the largest model gathered.
        zero |= {"stage3_max_live_parameters": LIVE_PARAMETERS, "stage3_max_reuse_distance": LIVE_PARAMETERS}
        zero |= {"stage3_prefetch_bucket_size": PREFETCHED_PARAMETERS}
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
