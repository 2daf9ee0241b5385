"""Every engine and every number of processes and workers trains the same.

Others start one of each library as a user does: test_training_resume.py and tests/launch/test_launch_two_nodes.py.
"""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from small_training import SMALL

from hpcm_scale.errors import STOPPED

pytestmark = pytest.mark.launch

STEPS = 3
WHOLE = ("model.fusion=attention", "data.crop=256", "train.batch_size=2", "data.workers=1")
COMMON = (*WHOLE, f"train.steps={STEPS}", "train.parametrisation=mup")
"""With several groups of parameters, each of which engines lay out by itself."""


def curve(records: list[dict], key: str = "train/loss") -> list[float]:
    return [record[key] for record in records if key in record]


@pytest.fixture(scope="module")
def baseline(train):
    return train("zero2", "engine=zero2", *COMMON)


OFFLOAD = pytest.param("zero3_offload", marks=pytest.mark.long)


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero3", OFFLOAD, "accelerate"])
def test_engines_agree(engine, baseline, train, launch):
    """In losses, gradients and exported weights, whatever is sharded."""
    records = train(engine, f"engine={engine}", *COMMON)
    assert curve(records) == pytest.approx(curve(baseline), rel=1e-5)
    assert curve(records, "train/grad_norm") == pytest.approx(curve(baseline, "train/grad_norm"), rel=1e-4)
    ours, theirs = (load_file(launch.folder / run / "weights.safetensors") for run in (engine, "zero2"))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 2e-4


def test_one_process_accumulating_agrees_with_two(baseline, train):
    records = train("alone", "engine=zero0", *COMMON, "data.workers=0", "train.micro_batch_size=1", processes=1)
    assert curve(records) == pytest.approx(curve(baseline), rel=1e-5)


def test_a_checkpoint_follows_deepspeeds_order_of_parameters(baseline, train):
    """An option of DeepSpeed's own changes it."""
    common = ("round_robin", "engine=zero2", *COMMON)
    train(*common, "+engine.options.zero_optimization.round_robin_gradients=true", f"train.stop_after={STEPS - 1}")
    records = train(*common, processes=1)
    assert curve(records) == pytest.approx(curve(baseline), rel=1e-6)


def test_bf16_trains_close_to_fp32(train):
    """At a small learning rate: Adam's first steps have its size also where bf16 rounds the sign of a gradient."""
    common = ("engine=zero2", *COMMON, "schedule.learning_rate=1e-4")
    fp32, bf16 = (train(name, *common, f"engine.precision={name}") for name in ("fp32", "bf16"))
    assert curve(bf16) == pytest.approx(curve(fp32), rel=0.02)


def test_a_diverging_run_skips_counts_and_stops(launch, shards):
    result = launch(
        *SMALL,
        f"data.shards={shards}",
        "schedule.learning_rate=1000",
        "train.steps=20",
        "train.max_skipped=4",
        "engine=zero0",
        "run.dir=diverged",
        processes=1,
    )
    assert result.returncode == 2
    assert "step 2 skipped" in result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith("hpcm: 4 steps in a row")


def test_a_sweep_that_is_asked_to_stop_begins_no_further_run(launch, shards):
    """In the last step of the first."""
    command = (
        "-m",
        *SMALL,
        "objective.lmbda=0.0067,0.025",
        f"data.shards={shards}",
        "train.steps=1",
        "train.max_hours=1e-6",
        "engine=zero0",
    )
    result = launch(*command, processes=1)
    assert result.returncode == STOPPED, result.stdout + result.stderr
    sweep = launch.folder / "runs" / "sweep_objective.lmbda"
    assert [file.parent.name for file in sweep.glob("*/weights.safetensors")] == ["objective.lmbda=0.0067"]
