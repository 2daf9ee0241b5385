"""`hpcm estimate` at the ends of what its keys and options take: numbers, no traceback, no memory by their size."""

from __future__ import annotations

import re

import pytest
from small_training import SHALLOW

WIDEST = [
    *SHALLOW,
    "model.g_a_blocks=[1,0,0,0]",
    "model.prior_s3.before=1",
    "model.channels=[16384,16384,16384]",
    "model.latent_channels=16384",
    "model.hyper_latent_channels=16384",
    "model.hyper_channels=16384",
    "model.expansion=64",
    "data.crop=16384",
    "train.batch_size=37",
    "train.steps=1000000000000",
]
NARROWEST = [
    *SHALLOW,
    "model.channels=[1,1,1]",
    "model.latent_channels=8",
    "model.hyper_latent_channels=1",
    "model.hyper_channels=1",
    "model.partial_ratio=1",
    "model.attention_heads=1",
    "model.expansion=1",
    "data.crop=128",
    "train.batch_size=1",
    "train.steps=1",
]
MANY = [
    *SHALLOW,
    "engine.world_size=1000000",
    "train.batch_size=1000000",
    "train.steps=1000000000000",
    "train.ema=[0.001,0.2886]",
]


@pytest.mark.launch
@pytest.mark.parametrize(
    "arguments",
    [
        [*WIDEST, "engine=zero3", "engine.precision=bf16", "engine.activation_checkpointing=steps"],
        NARROWEST,
        [*MANY, "engine=zero3", "--mfu", "1", "--price", "5e-324", "--bandwidth-node", "1e6", "--gpus-per-node", "1"],
        pytest.param(["model.g_a_blocks=[128,0,0,0]", "model.prior_s3.before=128"], marks=pytest.mark.long),
        pytest.param(
            ["schedule.crops=[16384]", "schedule.crop_boundaries=[0.5]", "train.batch_size=4096"],
            marks=pytest.mark.long,
        ),
        [
            *SHALLOW,
            "model.rate.levels=256",
            "model.rate.lowest=1e-9",
            "model.rate.highest=1e6",
            "train.steps=1000000000000",
        ],
    ],
    ids=["widest", "narrowest", "many processes", "deepest", "largest crops", "most rates"],
)
def test_an_estimate_at_the_ends(run, arguments):
    code, out, err = run("estimate", "model=nano", *arguments)
    assert code == 0, err
    assert "parameters" in out and not re.search(r"\b(nan|inf)\b", out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.batch_size=1000000"],
        ["data.crop=16384", "train.batch_size=64"],
        ["+engine.options.zero_optimization=3"],
        ["+engine.options.zero_optimization.reduce_bucket_size=abc"],
        ["engine=zero3", "+engine.options.zero_optimization.stage3_max_live_parameters=null"],
        ["model=swin", "model.size=1e400"],
        ["model=hpcm", "model.size=100k", "model.expansion=64"],
    ],
    ids=" ".join,
)
def test_what_has_no_estimate_is_refused_in_one_sentence(run, arguments):
    code, out, err = run("estimate", *([] if "model=" in arguments[0] else ["model=nano"]), *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and len(err) < 300, err
