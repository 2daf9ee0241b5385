"""Models that ZeRO-3 shards while they are made: the weights of the seed, and never the whole model in a process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.launch

KEPT = "+engine.options.zero_optimization.stage3_param_persistence_threshold"
NANO = ["model=nano", "train.batch_size=2"]
SWIN = ["model=swin", "model.size=100k", "train.batch_size=2"]
MACHINE = ["objective.target=vision_model", "machine.receivers=[random-vit]", "machine.pre_editor.tokens=random-vit"]
CASES = {
    "nano, and at more rates": [
        [*NANO, "engine=zero3", "train.parametrisation=mup", f"{KEPT}=0"],
        [*NANO, "engine=zero3", "model.rate.levels=3", "train.seed=1", f"{KEPT}=0"],
    ],
    "swin with small tensors whole, and with a pre-editor": [
        [*SWIN, "engine=zero3", "model.rate.levels=3"],
        [*SWIN, "engine=zero3", "model.rate.levels=3", *MACHINE, "machine.edit=true", "train.seed=1"],
    ],
    "convnext in host memory": [
        ["model=convnext", "model.size=100k", "train.batch_size=2", "engine=zero3_offload", f"{KEPT}=0"],
        ["model=convnext", "model.size=100k", "train.batch_size=2", "engine=zero3_offload", "train.seed=1"],
    ],
}


@pytest.fixture(scope="module")
def built(fork_server, tmp_path_factory):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    folder = tmp_path_factory.mktemp("building")
    arguments = [json.dumps(list(CASES.values()))]
    process = fork_server.start("building_probe", arguments, cwd=folder, env=environment, processes=2)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, output + errors
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return dict(zip(CASES, zip(lines[::2], lines[1::2], strict=True), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_sharded_while_it_is_made_a_model_starts_with_the_same_weights(case, built):
    for found in built[case]:
        assert found["equal"]
        assert found["most"] <= found["largest"] < found["all"] / 4  # one layer at a time
        assert found["left"] == 0
