"""A step's results are looked at once: whatever else asked for a value would make the host wait for the device."""

from __future__ import annotations

import json

import pytest
from small_training import SMALL

pytestmark = pytest.mark.launch


@pytest.mark.parametrize("engine", ["accelerate", "zero0"])
def test_a_step_copies_values_to_the_host_once(engine, launch, shards, project, tmp_path):
    """However many micro-batches it has. With sharded gradients DeepSpeed looks at some by itself."""
    looked_at = tmp_path / "looks.json"
    result = launch(
        *SMALL,
        f"engine={engine}",
        f"data.shards={shards}",
        "train.micro_batch_size=2",
        "train.steps=3",
        f"run.dir={tmp_path / 'run'}",
        processes=1,
        module="looking_train",
        LOOKED_AT=str(looked_at),
        PYTHONPATH=str(project / "tests" / "training"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    looks = json.loads(looked_at.read_text())
    assert [step.get("tolist") for step in looks] == [1, 1, 1]
    assert [(step.get("item", 0), step.get("copies", 0)) for step in looks] == [(0, 0)] * 3
