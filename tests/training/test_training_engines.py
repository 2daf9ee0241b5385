"""Every engine and every number of processes and workers trains the same; one of each library as a user starts it."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.launch

STEPS = 3


def curve(records: list[dict], key: str = "train/loss") -> list[float]:
    return [record[key] for record in records if key in record]


@pytest.fixture(scope="module")
def baseline(train):
    return train("zero2", "engine=zero2", f"train.steps={STEPS}", "log.wandb=disabled", launcher=True)


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero3", "zero3_offload", "accelerate"])
def test_engines_agree(engine, baseline, train, launch):
    """In losses, gradients and exported weights, whatever is sharded."""
    launcher = engine == "accelerate"
    records = train(engine, f"engine={engine}", f"train.steps={STEPS}", "log.wandb=disabled", launcher=launcher)
    assert curve(records) == pytest.approx(curve(baseline), rel=1e-5)
    assert curve(records, "train/grad_norm") == pytest.approx(curve(baseline, "train/grad_norm"), rel=1e-4)
    ours, theirs = (load_file(launch.folder / run / "weights.safetensors") for run in (engine, "zero2"))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 2e-4


@pytest.mark.parametrize("workers, micro_batch", [(0, 2), (1, 4)])
def test_one_process_accumulating_agrees_with_two(workers, micro_batch, baseline, train):
    records = train(
        f"alone{workers}",
        "engine=zero0",
        f"train.steps={STEPS}",
        f"data.workers={workers}",
        f"train.micro_batch_size={micro_batch}",
        "log.wandb=disabled",
        processes=1,
    )
    assert curve(records) == pytest.approx(curve(baseline), rel=1e-5)


def test_bf16_trains_close_to_fp32(baseline, train):
    records = train("bf16", "engine=zero2", "engine.precision=bf16", f"train.steps={STEPS}", "log.wandb=disabled")
    assert curve(records) == pytest.approx(curve(baseline), rel=0.02)


def test_a_diverging_run_skips_counts_and_stops(launch, shards):
    result = launch(
        "model=nano",
        f"data.shards={shards}",
        "train.batch_size=4",
        "schedule.learning_rate=1e30",
        "train.steps=20",
        "train.max_skipped=4",
        "engine=zero0",
        "log.wandb=disabled",
        "run.dir=diverged",
        processes=1,
    )
    assert result.returncode == 2
    assert "step 2 skipped" in result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith("hpcm: 4 steps in a row")


def test_a_sweep_runs_one_after_the_other(launch, shards):
    result = launch(
        "-m",
        "model=nano",
        "objective.lmbda=0.0067,0.025",
        f"data.shards={shards}",
        "train.batch_size=2",
        "train.steps=1",
        "engine=zero0",
        "log.wandb=disabled",
        processes=1,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for value in ("0.0067", "0.025"):
        run = launch.folder / "runs" / "sweep_objective.lmbda" / f"objective.lmbda={value}"
        assert (run / "weights.safetensors").is_file()
