"""DeepSpeed's dictionary: its keys are DeepSpeed's own, its values ours."""

from __future__ import annotations

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from hpcm_scale.config.compose import compose
from hpcm_scale.config.deepspeed import (
    KEPT_PARAMETERS,
    LIVE_PARAMETERS,
    PREFETCHED_PARAMETERS,
    REDUCED_PARAMETERS,
    REUSE_DISTANCE,
)
from hpcm_scale.config.spec import RunSpec

STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


@pytest.mark.parametrize("engine", STAGES)
def test_deepspeed_reads_what_we_mean(engine):
    config = compose(["model=nano", f"engine={engine}", "train.micro_batch_size=8", "train.clip_norm=0.5"])
    read = DeepSpeedConfig(RunSpec.of(config, world_size=1).deepspeed)  # without a process group it takes one process
    assert read.train_batch_size == 32
    assert read.train_micro_batch_size_per_gpu == 8
    assert read.gradient_accumulation_steps == 4
    assert read.zero_optimization_stage == STAGES[engine]
    # Stage 0 clips in our own optimizer, which also guards it against gradients that are not finite.
    assert read.gradient_clipping == (0.5 if STAGES[engine] else 0.0)
    assert not read.float16_config.enabled and not read.bfloat16_config.enabled
    assert read.zero_config.reduce_bucket_size == REDUCED_PARAMETERS
    if STAGES[engine] == 3:
        assert read.zero_config.max_live_parameters == LIVE_PARAMETERS
        assert read.zero_config.max_reuse_distance == REUSE_DISTANCE
        assert read.zero_config.prefetch_bucket_size == PREFETCHED_PARAMETERS
        assert read.zero_config.param_persistence_threshold == KEPT_PARAMETERS
    assert bool(read.zero_config.overlap_comm) == (STAGES[engine] > 0)
    offloaded = [read.zero_config.offload_optimizer, read.zero_config.offload_param]
    assert [entry is not None and entry.device == "cpu" for entry in offloaded] == [engine == "zero3_offload"] * 2


@pytest.mark.parametrize("engine", STAGES)
def test_every_zero_key_is_one_of_deepspeeds(engine):
    """DeepSpeed ignores keys that it does not know at some levels; a misspelt one must not pass."""
    zero = RunSpec.of(compose(["model=nano", f"engine={engine}"]), world_size=1).deepspeed["zero_optimization"]
    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values()}
    assert set(zero) <= known


def test_options_are_merged_and_plain():
    config = compose(["model=nano", "+engine.options.zero_optimization.overlap_comm=false", "+engine.options.seed=3"])
    dictionary = RunSpec.of(config, world_size=2).deepspeed
    assert dictionary["zero_optimization"]["overlap_comm"] is False
    assert dictionary["zero_optimization"]["stage"] == 2 and dictionary["seed"] == 3
    assert type(dictionary) is dict and type(dictionary["zero_optimization"]) is dict
