"""Combinations that cannot work are refused, in one line that names the key and the remedy."""

from __future__ import annotations

import math
from dataclasses import replace
from operator import attrgetter

import pytest

from hpcm_scale.config.checks import check, check_model, side_multiple
from hpcm_scale.config.schema import Config, EngineName, Fusion
from hpcm_scale.config.spec import RunSpec
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
    ({"train.batch_size": 30}, 8, "indivisible-batch", "train.batch_size"),
    ({"train.batch_size": 3}, 8, "indivisible-batch", "train.batch_size"),
    ({"train.micro_batch_size": 3}, 2, "indivisible-batch", "train.batch_size"),
    ({"train.micro_batch_size": 64}, 1, "indivisible-batch", "train.batch_size"),
    ({"train.micro_batch_size": 0}, 1, "out-of-range", "train.micro_batch_size"),
    ({"train.batch_size": 0}, 1, "out-of-range", "train.batch_size"),
    ({"engine.world_size": 4}, 2, "other-world-size", "engine.world_size"),
    ({"engine.world_size": -1}, 1, "out-of-range", "engine.world_size"),
    # crops
    ({"data.crop": 200}, 1, "crop-multiple", "data.crop"),
    ({"data.crop": 384}, 1, "crop-multiple", "data.crop"),
    ({"data.crop": 0}, 1, "out-of-range", "data.crop"),
    ({"data.crop": 192, "model.fusion": Fusion.none}, 1, "crop-multiple", "data.crop"),
    ({"data.crop": 129, "model.fusion": Fusion.none}, 1, "crop-multiple", "data.crop"),
    # numbers
    ({"train.steps": 0}, 1, "out-of-range", "train.steps"),
    ({"train.checkpoint_every": 0}, 1, "out-of-range", "train.checkpoint_every"),
    ({"train.keep_checkpoints": 0}, 1, "out-of-range", "train.keep_checkpoints"),
    ({"train.max_skipped": 0}, 1, "out-of-range", "train.max_skipped"),
    ({"train.seed": -1}, 1, "out-of-range", "train.seed"),
    ({"train.stop_after": 0}, 1, "out-of-range", "train.stop_after"),
    ({"train.stop_after": 11, "train.steps": 10}, 1, "stop-after-end", "train.stop_after"),
    ({"train.clip_norm": 0.0}, 1, "out-of-range", "train.clip_norm"),
    ({"train.clip_norm": math.nan}, 1, "out-of-range", "train.clip_norm"),
    ({"optimizer.betas": [0.9]}, 1, "betas-length", "optimizer.betas"),
    ({"optimizer.betas": [0.9, 1.0]}, 1, "out-of-range", "optimizer.betas"),
    ({"train.profile_steps": [100]}, 1, "profile-steps", "train.profile_steps"),
    ({"train.profile_steps": [100, 100]}, 1, "profile-steps", "train.profile_steps"),
    ({"train.profile_steps": [0, 3]}, 1, "out-of-range", "train.profile_steps"),
    ({"train.profile_steps": [9, 11], "train.steps": 10}, 1, "profile-steps", "train.profile_steps"),
    ({"objective.lmbda": 0.0}, 1, "out-of-range", "objective.lmbda"),
    ({"objective.lmbda": math.inf}, 1, "out-of-range", "objective.lmbda"),
    ({"eval.every": 0}, 1, "out-of-range", "eval.every"),
    ({"eval.limit": 0}, 1, "out-of-range", "eval.limit"),
    ({"eval.max_failed": 0}, 1, "out-of-range", "eval.max_failed"),
    ({"log.every": 0}, 1, "out-of-range", "log.every"),
    ({"log.print_seconds": 0}, 1, "out-of-range", "log.print_seconds"),
    ({"log.images": -1}, 1, "out-of-range", "log.images"),
    ({"data.workers": -1}, 1, "out-of-range", "data.workers"),
    ({"data.prefetch": 0}, 1, "out-of-range", "data.prefetch"),
    ({"data.retries": 0}, 1, "out-of-range", "data.retries"),
    ({"data.timeout": 0.0}, 1, "out-of-range", "data.timeout"),
    # schedule
    ({"schedule.factors": [1.0]}, 1, "factors-length", "schedule.factors"),
    ({"schedule.boundaries": [0.9, 0.8, 0.95]}, 1, "descending-boundaries", "schedule.boundaries"),
    ({"schedule.boundaries": [0.0, 0.8, 0.9]}, 1, "out-of-range", "schedule.boundaries"),
    ({"schedule.boundaries": [0.5, 100, 200]}, 1, "mixed-boundaries", "schedule.boundaries"),
    ({"schedule.learning_rate": 0.0}, 1, "out-of-range", "schedule.learning_rate"),
    ({"schedule.warmup": -1}, 1, "out-of-range", "schedule.warmup"),
    ({"schedule.factors": [1.0, -0.3, 0.1, 0.01]}, 1, "out-of-range", "schedule.factors"),
    ({"schedule.decay": -0.1}, 1, "out-of-range", "schedule.decay"),
    ({"schedule.decay": 11.0, "train.steps": 10}, 1, "decay-too-long", "schedule.decay"),
    ({"schedule.decay": math.nan}, 1, "out-of-range", "schedule.decay"),
    # branches
    ({"train.keep_at": [5, 0]}, 1, "out-of-range", "train.keep_at"),
    ({"train.keep_at": [11], "train.steps": 10}, 1, "keep-after-end", "train.keep_at"),
    ({"run.cooldown_of": "trunk"}, 1, "incomplete-cooldown", "run.cooldown_of"),
    ({"run.cooldown_at": 5}, 1, "incomplete-cooldown", "run.cooldown_of"),
    ({"run.cooldown_at": 10, "run.cooldown_of": "trunk", "train.steps": 10}, 1, "cooldown-at-end", "run.cooldown_at"),
    ({"run.cooldown_at": 0, "run.cooldown_of": "trunk"}, 1, "out-of-range", "run.cooldown_at"),
    # engine
    ({"engine.zero_stage": 4}, 1, "out-of-range", "engine.zero_stage"),
    ({"engine.offload": True}, 1, "offload-stage", "engine.offload"),
    ({"engine.name": EngineName.accelerate}, 1, "accelerate-stage", "engine.zero_stage"),
    (
        {"engine.name": EngineName.accelerate, "engine.zero_stage": 0, "engine.options": {"a": 1}},
        1,
        "accelerate-options",
        "engine.options",
    ),
    ({"engine.options": {"bf16": {"enabled": True}}}, 1, "generated-option", "engine.options.bf16"),
    ({"engine.options": {"train_batch_size": 64}}, 1, "generated-option", "engine.options.train_batch_size"),
    (
        {"engine.options": {"zero_optimization": {"stage": 1}}},
        1,
        "generated-zero-stage",
        "engine.options.zero_optimization.stage",
    ),
    (
        {"engine.options": {"zero_optimization": {"offload_param": {"device": "nvme"}}}},
        1,
        "nvme-offload",
        "engine.options.zero_optimization.offload_param.device",
    ),
    # model
    ({"model.channels": [96, 192]}, 1, "model-list-length", "model.channels"),
    ({"model.g_a_blocks": [1, 2, 3]}, 1, "model-list-length", "model.g_a_blocks"),
    ({"model.g_s_blocks": [1, 2, 3, -1]}, 1, "out-of-range", "model.g_s_blocks"),
    ({"model.prior_s3.refine": -1}, 1, "out-of-range", "model.prior_s3.refine"),
    ({"model.channels": [0, 192, 384]}, 1, "out-of-range", "model.channels"),
    ({"model.latent_channels": 324}, 1, "latent-channels-multiple", "model.latent_channels"),
    ({"model.latent_channels": 0}, 1, "out-of-range", "model.latent_channels"),
    ({"model.attention_heads": 48}, 1, "attention-heads-divisor", "model.attention_heads"),
    ({"model.attention_heads": 0}, 1, "out-of-range", "model.attention_heads"),
    ({"model.stem_kernel": 3}, 1, "stem-kernel", "model.stem_kernel"),
    ({"model.partial_ratio": 0}, 1, "out-of-range", "model.partial_ratio"),
    ({"model.partial_ratio": 97}, 1, "partial-ratio-too-large", "model.partial_ratio"),
]


@pytest.mark.parametrize(("changes", "world_size", "code", "key"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused(changes, world_size, code, key):
    config = configured(changes)
    with pytest.raises(UserError) as refused:
        check(config, world_size)
    text = str(refused.value)
    assert (refused.value.code, refused.value.key) == (code, key) and "\n" not in text
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
            spec = RunSpec.of(config, world_size)
            assert world_size * spec.micro_batch_size * spec.accumulation == config.train.batch_size


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
