"""Combinations that cannot work are refused, in one line that names the key and the mend."""

from __future__ import annotations

import math
from dataclasses import replace
from operator import attrgetter

import pytest

from hpcm_scale.config.checks import accumulation, check, check_model, micro_batch_size, side_multiple
from hpcm_scale.config.schema import Config, EngineName, Fusion
from hpcm_scale.errors import UserError


def configured(changes: dict[str, object]) -> Config:
    """The defaults with some keys set, unchecked."""
    config = Config()
    for key, value in changes.items():
        parent, _, name = key.rpartition(".")
        assert hasattr(attrgetter(parent)(config), name)
        setattr(attrgetter(parent)(config), name, value)
    return config


REFUSED = [
    # batch and processes
    ({"train.batch_size": 30}, 8, "train.batch_size=30 does not divide over 8 processes; use train.batch_size=32"),
    ({"train.batch_size": 3}, 8, "use train.batch_size=8"),
    ({"train.micro_batch_size": 3}, 2, "over 2 processes × train.micro_batch_size=3; use train.batch_size=30"),
    ({"train.micro_batch_size": 64}, 1, "use train.batch_size=64"),
    ({"train.micro_batch_size": 0}, 1, "train.micro_batch_size=0 must be at least 1"),
    ({"train.batch_size": 0}, 1, "train.batch_size=0 must be at least 1"),
    ({"engine.world_size": 4}, 2, "engine.world_size=4, but the launcher started 2 processes"),
    ({"engine.world_size": -1}, 1, "engine.world_size=-1 must be at least 1"),
    # crops
    ({"data.crop": 200}, 1, "multiples of 256 pixels; use data.crop=256"),
    ({"data.crop": 384}, 1, "use data.crop=512"),
    ({"data.crop": 0}, 1, "data.crop=0 must be at least 128"),
    ({"data.crop": 192, "model.fusion": Fusion.none}, 1, "multiples of 128 pixels; use data.crop=256"),
    ({"data.crop": 129, "model.fusion": Fusion.none}, 1, "use data.crop=128"),
    # numbers
    ({"train.steps": 0}, 1, "train.steps=0 must be at least 1"),
    ({"train.checkpoint_every": 0}, 1, "train.checkpoint_every=0"),
    ({"train.keep_checkpoints": 0}, 1, "train.keep_checkpoints=0"),
    ({"train.max_skipped": 0}, 1, "train.max_skipped=0"),
    ({"train.seed": -1}, 1, "train.seed=-1 must be at least 0"),
    ({"train.stop_after": 0}, 1, "train.stop_after=0 must be at least 1"),
    ({"train.stop_after": 11, "train.steps": 10}, 1, "train.stop_after=11 must lie between 1 and train.steps=10"),
    ({"train.clip_norm": 0.0}, 1, "train.clip_norm=0.0 must be greater than 0"),
    ({"train.clip_norm": math.nan}, 1, "train.clip_norm=nan"),
    ({"train.betas": [0.9]}, 1, "train.betas=[0.9] must be two numbers"),
    ({"train.betas": [0.9, 1.0]}, 1, "train.betas=[0.9, 1.0]"),
    ({"train.profile_steps": [100]}, 1, "train.profile_steps=[100] must be two ascending steps between 1 and"),
    ({"train.profile_steps": [100, 100]}, 1, "train.profile_steps=[100, 100] must be two ascending steps"),
    ({"train.profile_steps": [0, 3]}, 1, "train.profile_steps=[0, 3] must be at least 1"),
    ({"train.profile_steps": [9, 11], "train.steps": 10}, 1, "and train.steps=10"),
    ({"objective.lmbda": 0.0}, 1, "objective.lmbda=0.0 must be at least 1e-09 and at most 1,000,000"),
    ({"objective.lmbda": math.inf}, 1, "objective.lmbda=inf must be at least 1e-09 and at most 1,000,000"),
    ({"eval.every": 0}, 1, "eval.every=0"),
    ({"eval.limit": 0}, 1, "eval.limit=0 must be at least 1"),
    ({"eval.max_failed": 0}, 1, "eval.max_failed=0 must be at least 1"),
    ({"log.every": 0}, 1, "log.every=0"),
    ({"log.print_seconds": 0}, 1, "log.print_seconds=0 must be greater than 0"),
    ({"log.images": -1}, 1, "log.images=-1"),
    ({"data.workers": -1}, 1, "data.workers=-1 must be at least 0"),
    ({"data.prefetch": 0}, 1, "data.prefetch=0"),
    ({"data.retries": 0}, 1, "data.retries=0"),
    ({"data.timeout": 0.0}, 1, "data.timeout=0.0 must be greater than 0"),
    # schedule
    ({"schedule.factors": [1.0]}, 1, "schedule.factors has 1 entries for 3 schedule.boundaries"),
    ({"schedule.boundaries": [0.9, 0.8, 0.95]}, 1, "must rise"),
    ({"schedule.boundaries": [0.0, 0.8, 0.9]}, 1, "must be greater than 0"),
    ({"schedule.boundaries": [0.5, 100, 200]}, 1, "mixes fractions (≤ 1) and steps (> 1)"),
    ({"schedule.learning_rate": 0.0}, 1, "schedule.learning_rate=0.0 must be at least 1e-12"),
    ({"schedule.warmup": -1}, 1, "schedule.warmup=-1 must be at least 0"),
    ({"schedule.factors": [1.0, -0.3, 0.1, 0.01]}, 1, "schedule.factors=[1.0, -0.3, 0.1, 0.01] must be at least 0"),
    ({"schedule.decay": -0.1}, 1, "schedule.decay=-0.1 must be at least 0"),
    ({"schedule.decay": 11.0, "train.steps": 10}, 1, "schedule.decay=11 is longer than train.steps=10"),
    ({"schedule.decay": math.nan}, 1, "schedule.decay=nan"),
    # branches
    ({"train.keep_at": [5, 0]}, 1, "train.keep_at=[5, 0] must be at least 1"),
    ({"train.keep_at": [11], "train.steps": 10}, 1, "train.keep_at=[11]"),
    ({"run.cooldown_of": "trunk"}, 1, "run.cooldown_of and run.cooldown_at belong together"),
    ({"run.cooldown_at": 5}, 1, "run.cooldown_of and run.cooldown_at belong together"),
    ({"run.cooldown_at": 10, "run.cooldown_of": "trunk", "train.steps": 10}, 1, "run.cooldown_at=10 leaves nothing of"),
    ({"run.cooldown_at": 0, "run.cooldown_of": "trunk"}, 1, "run.cooldown_at=0 must be at least 1"),
    # engine
    ({"engine.zero_stage": 4}, 1, "engine.zero_stage=4 must be at least 0 and at most 3"),
    ({"engine.offload": True}, 1, "engine.offload needs engine.zero_stage=3, not 2"),
    ({"engine.name": EngineName.accelerate}, 1, "use engine=accelerate"),
    (
        {"engine.name": EngineName.accelerate, "engine.zero_stage": 0, "engine.options": {"a": 1}},
        1,
        "engine.options are DeepSpeed's",
    ),
    ({"engine.options": {"bf16": {"enabled": True}}}, 1, "engine.options.bf16 is generated from engine.precision"),
    ({"engine.options": {"train_batch_size": 64}}, 1, "engine.options.train_batch_size is generated"),
    ({"engine.options": {"zero_optimization": {"stage": 1}}}, 1, "stage is generated from engine.zero_stage"),
    (
        {"engine.options": {"zero_optimization": {"offload_param": {"device": "nvme"}}}},
        1,
        "offload_param.device=nvme keeps weights",
    ),
    # model
    ({"model.channels": [96, 192]}, 1, "model.channels=[96, 192] must be a list of 3 numbers"),
    ({"model.g_a_blocks": [1, 2, 3]}, 1, "model.g_a_blocks"),
    ({"model.g_s_blocks": [1, 2, 3, -1]}, 1, "model.g_s_blocks=[1, 2, 3, -1] must be at least 0"),
    ({"model.prior_s3.refine": -1}, 1, "model.prior_s3.refine=-1 must be at least 0"),
    ({"model.channels": [0, 192, 384]}, 1, "model.channels=[0, 192, 384] must be at least 1"),
    ({"model.latent_channels": 324}, 1, "model.latent_channels=324 must be a multiple of 8"),
    ({"model.latent_channels": 0}, 1, "model.latent_channels=0 must be at least 8"),
    ({"model.attention_heads": 48}, 1, "model.attention_heads=48 must divide twice model.latent_channels=320"),
    ({"model.attention_heads": 0}, 1, "model.attention_heads=0 must be at least 1"),
    ({"model.stem_kernel": 3}, 1, "model.stem_kernel=3 must be 2 or 4"),
    ({"model.partial_ratio": 0}, 1, "model.partial_ratio=0 must be at least 1"),
    ({"model.partial_ratio": 97}, 1, "the smallest width, 96"),
]


@pytest.mark.parametrize(("changes", "world_size", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused(changes, world_size, message):
    config = configured(changes)
    with pytest.raises(UserError) as refused:
        check(config, world_size)
    text = str(refused.value)
    assert message in text and "\n" not in text
    assert next(iter(changes)).rpartition(".")[2] in text or "engine=accelerate" in text


def test_the_mend_in_the_message_mends():
    """Whatever does not divide: the number that the message proposes does."""
    for batch_size in range(1, 70):
        for world_size, micro in ((1, 4), (2, None), (3, 5), (8, None), (8, 2)):
            config = configured({"train.batch_size": batch_size, "train.micro_batch_size": micro})
            try:
                check(config, world_size)
            except UserError as error:
                config.train.batch_size = int(str(error).rpartition("train.batch_size=")[2])
                check(config, world_size)
            micro_batch = micro_batch_size(config, world_size)
            assert world_size * micro_batch * accumulation(config, world_size) == config.train.batch_size


def test_edges_that_are_fine():
    check(
        configured({"train.steps": 1, "train.stop_after": 1, "schedule.boundaries": [], "schedule.factors": [1.0]}), 1
    )
    check(configured({"schedule.boundaries": [10, 20, 30], "log.images": 0, "data.workers": 0, "eval.limit": 1}), 32)
    check(configured({"schedule.boundaries": [0.5, 0.75, 1.0], "schedule.factors": [1.0, 0.5, 0.25, 0.0]}), 1)
    check(configured({"engine.zero_stage": 3, "engine.offload": True, "engine.world_size": 4}), 4)
    check(configured({"engine.options": {"zero_optimization": {"overlap_comm": False}}}), 1)


def test_sides():
    model = Config().model
    assert side_multiple(model) == 256
    assert side_multiple(replace(model, fusion=Fusion.none)) == 128
    check_model(replace(model, fusion=Fusion.none, attention_heads=7))  # nobody asks for its heads
