"""The smallest size of every family on two processes, under ZeRO-3."""

from __future__ import annotations

import json
import math

import pytest
from safetensors.torch import load_file

from hpcm_scale.model import families
from hpcm_scale.model.ladder import WITHIN
from hpcm_scale.model.weights import load_weights

pytestmark = pytest.mark.launch

STEPS = 2


def test_the_smallest_of_each_family_trains_sharded(launch, shards):
    """One after the other in one launch: a multirun over families of one size."""
    names = families.names()
    result = launch(
        "-m",
        f"model={','.join(names)}",
        "model.size=100k",
        "model.fusion=none",
        "data.crop=128",
        "engine=zero3",
        f"data.shards={shards}",
        f"train.steps={STEPS}",
        "train.batch_size=2",
        "data.workers=0",
        "log.wandb=disabled",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for name in names:
        run = launch.folder / "runs" / "sweep_model" / f"model={name}"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [line["step"] for line in lines if "train/loss" in line] == [1, 2]
        assert all(math.isfinite(line["train/loss"]) and line["train/grad_norm"] > 0 for line in lines)
        model, _ = load_weights(run)
        assert (model.config.name, model.config.family) == (f"{name}_100k", name)
        count = sum(tensor.numel() for tensor in load_file(run / "weights.safetensors").values())
        assert count == pytest.approx(1e5, rel=WITHIN)
