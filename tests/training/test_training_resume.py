"""Stopping and going on, with DeepSpeed on two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from small_training import SMALL

pytestmark = pytest.mark.launch

EVALUATION = ("eval.every=3", "log.images=1", "log.wandb=offline")
NUMBERS = ("train/", "eval/", "compute/", "step")


def numbers(records: list[dict]) -> list[dict]:
    """Everything in a journal that does not depend on the clock."""
    return [{key: value for key, value in record.items() if key.startswith(NUMBERS)} for record in records]


@pytest.fixture(scope="module")
def evaluation(two_images):
    return (f"eval.images={two_images}", *EVALUATION)


@pytest.fixture(scope="module")
def unbroken(train, evaluation):
    return train("unbroken", *evaluation, "engine=zero2", "train.steps=6", "train.checkpoint_every=2")


@pytest.fixture(scope="module")
def resumed(train, evaluation, launch):
    overrides = (*evaluation, "engine=zero2", "train.steps=6", "train.checkpoint_every=2")
    train("resumed", *overrides, "train.stop_after=3")
    stopped = train.output
    records = train("resumed", *overrides)
    return records, stopped, train.output


def test_a_resumed_run_has_the_unbroken_journal_in_every_digit(unbroken, resumed):
    records, stopped, went_on = resumed
    assert numbers(records) == numbers(unbroken)
    assert [record["step"] for record in records] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert "stopped at step 3 of 6" in stopped
    assert "resuming from step 3" in went_on
    times = [record["time"] for record in records]
    assert times == sorted(times)


def test_wandb_holds_one_run_with_the_journals_curves(resumed, launch):
    [file] = (launch.folder / "resumed" / "wandb").glob("offline-run-*/*.wandb")
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    output = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in output.splitlines()]
    metrics = [record["metric"] for record in records if record["type"] == "metric"]
    axis_of = {metric["name"]: metric.get("step_metric") for metric in metrics}
    assert axis_of["train/loss"] == axis_of["eval/loss"] == "compute/pflops"
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    for curve in ("train/loss", "eval/loss"):
        points = [(row["compute/pflops"], row[curve]) for row in history if curve in row]
        assert points == [(line["compute/pflops"], line[curve]) for line in resumed[0] if curve in line]


def test_every_line_has_the_keys_of_the_contract(unbroken):
    for record in unbroken:
        assert {"step", "time", "train/images", "compute/pflops"} <= set(record)
        assert record["train/images"] == 4 * record["step"]
        assert record.get("train/loss", 1) > 0
    assert "perf/mfu" not in unbroken[0]  # a CPU's peak is not known
    assert {"eval/loss", "eval/bpp", "eval/psnr"} <= set(unbroken[-1])


def test_the_run_folder_is_whole(unbroken, launch):
    folder = launch.folder / "unbroken"
    assert {"config.yaml", "metrics.jsonl", "environment.json", "weights.safetensors", "wandb_id"} <= {
        path.name for path in folder.iterdir()
    }
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_00000004", "step_00000006"]
    assert json.loads((folder / "environment.json").read_text())[0]["packages"]["torch"]


def test_the_same_command_on_a_finished_run_does_nothing(resumed, train, evaluation, launch):
    before = (launch.folder / "resumed" / "metrics.jsonl").read_bytes()
    train("resumed", *evaluation, "engine=zero2", "train.steps=6", "train.checkpoint_every=2")
    assert "finished at step 6" in train.output
    assert (launch.folder / "resumed" / "metrics.jsonl").read_bytes() == before


def test_more_steps_lengthen_a_finished_run_and_say_so(unbroken, train, evaluation):
    longer = ("engine=zero2", "train.steps=8", "train.checkpoint_every=2", "log.wandb=disabled")
    records = train("unbroken", *evaluation, *longer)
    assert "train.steps changes from 6 to 8" in train.output
    assert numbers(records[: len(unbroken)]) == numbers(unbroken)
    assert records[-1]["step"] == 8


def test_asked_to_stop_where_it_was_to_stop_anyway_it_is_done(train):
    train("done", "train.stop_after=1", "train.max_hours=1e-6", processes=1)
    assert "stopped at step 1 of" in train.output


def test_fewer_steps_than_done_and_another_run_are_refused(unbroken, launch, shards):
    base = (*SMALL, f"data.shards={shards}", "engine=zero2", "run.dir=unbroken")
    other = launch(*base, "schedule.learning_rate=2e-3", "train.steps=8", processes=1)
    assert other.returncode == 2
    assert other.stderr.count("\n") == 1 and "schedule.learning_rate=0.001, not 0.002" in other.stderr
    fewer = launch(*base, "schedule.learning_rate=1e-3", "train.steps=5", processes=1)
    assert fewer.returncode == 2 and ", beyond train.steps=5" in fewer.stderr


def test_sigterm_leaves_a_checkpoint_and_the_same_command_goes_on(train, launch, shards, exit_codes):
    overrides = ("engine=zero1", "train.steps=5000")
    process = launch(*SMALL, f"data.shards={shards}", *overrides, "run.dir=terminated", wait=False, launcher=True)
    journal = launch.folder / "terminated" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (journal.is_file() and journal.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)  # as Slurm and a terminal do: to the launcher and its processes
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == -signal.SIGTERM and "`deepspeed` itself" in exit_codes[str(128 + signal.SIGTERM)]
    assert "stopped on request (SIGTERM) with a checkpoint at step" in stdout, stdout + stderr
    stopped_at = json.loads(journal.read_text().splitlines()[-1])["step"]
    records = train("terminated", *overrides, f"train.stop_after={stopped_at + 2}")
    assert [record["step"] for record in records] == list(range(1, stopped_at + 3))
