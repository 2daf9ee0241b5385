"""Training under a real Slurm: preempted, out of time, failing, cancelled; by hand and from a sweep."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import FINAL, Cluster, await_that, cluster, missing

from hpcm_scale.errors import STOPPED
from hpcm_scale.sweeps.status import Follower

pytestmark = [
    pytest.mark.launch,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=f"Slurm is not installed: there is no {', '.join(missing())}"),
]

COMMON = ("train.batch_size=2", "log.wandb=disabled", "data.workers=0", "engine=accelerate")
TWO_TASKS = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0")
LONG = "train.steps=5000"


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        running.environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        yield running


@pytest.fixture
def slurm(started) -> Iterator[Cluster]:
    """The cluster, with nothing in its queue."""
    yield started
    started.clear()


@pytest.fixture
def by_hand(slurm, project, active, tmp_path):
    """`by_hand(run, *overrides)`: launch/slurm.sbatch, submitted with two tasks; returns the job's number."""

    def submit(run: Path, *overrides: str, partition: str = "spare") -> str:
        where = (f"--partition={partition}", f"--output={tmp_path / 'log'}")
        options = (*TWO_TASKS, *where, project / "launch/slurm.sbatch")
        return slurm.submit(
            *options, "model=nano", f"run.dir={run}", *COMMON, *overrides, cwd=project, VIRTUAL_ENV=active
        )

    return submit


def steps(run: Path) -> list[int]:
    """The steps in a run's journal so far."""
    journal = run / "metrics.jsonl"
    text = journal.read_text() if journal.is_file() else ""
    return [json.loads(line)["step"] for line in text[: text.rfind("\n") + 1].splitlines()]


def trained(slurm: Cluster, job: str, run: Path, log: Path, beyond: int = 2) -> int:
    """Wait until a job has trained its run beyond a step; returns the last step now."""

    def begun() -> bool:
        assert slurm.job(job)["JobState"] not in FINAL, log.read_text()
        return bool(steps(run)) and steps(run)[-1] > beyond

    await_that(begun, lambda: log.read_text() if log.exists() else slurm.job(job))
    return steps(run)[-1]


def gone_on_from(log: Path) -> int:
    """The step from which a run was taken up, the only time that it was."""
    [step] = re.findall(r"^resuming from step (\d+)", log.read_text(), re.MULTILINE)
    return int(step)


def test_a_preempted_run_of_two_tasks_goes_back_into_the_queue_and_is_finished(slurm, by_hand, shards, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    job = by_hand(run, f"data.shards={shards}", "train.steps=40")
    trained(slurm, job, run, log)
    slurm.preempt()
    slurm.wait(job, "PENDING", log.read_text)
    stopped_at = steps(run)[-1]
    assert stopped_at < 40 and not (run / "weights.safetensors").exists()
    ends = set(re.findall(r"tasks? [-01]+: (.+)", log.read_text()))
    assert ends == {f"Exited with exit code {STOPPED}"}  # neither was killed

    done = slurm.wait(job, "COMPLETED", log.read_text)
    assert (done["ExitCode"], done["Restarts"]) == ("0:0", "1"), log.read_text()
    assert gone_on_from(log) == stopped_at
    assert steps(run) == list(range(1, 41)) and (run / "weights.safetensors").exists()


def test_preempted_before_it_trains_a_run_goes_back_into_the_queue(slurm, by_hand, shards, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    job = by_hand(run, f"data.shards={shards}", LONG, partition="hasty")
    await_that(lambda: f"{job}.0" in slurm.call("squeue", "--steps", "--noheader", "--format=%i"), log.read_text)
    slurm.preempt()
    slurm.wait(job, "PENDING", log.read_text)
    before, signalled, _ = log.read_text().partition("CANCELLED")  # as Slurm calls SIGTERM
    assert signalled and "parameters" not in before and slurm.job(job)["Restarts"] == "1", log.read_text()


def test_out_of_time_a_run_of_a_sweep_goes_back_into_the_queue_and_goes_on(slurm, shards, tmp_path):
    options = ("gpus_per_node=0", "cpus_per_task=1", "time=1:00:00", "grace=120", "partition=spare")
    launcher = ("hydra/launcher=slurm", *(f"hydra.launcher.{option}" for option in options))
    data = (f"data.shards={shards}", *COMMON, LONG)
    call = (sys.executable, "-m", "hpcm_scale.train", "-m", "model=nano", *data, *launcher)
    slurm.call(*call, cwd=tmp_path)
    [job] = slurm.jobs().split()
    run = tmp_path / "runs" / "nano"
    log = run.with_name("nano.log")
    assert f"{run.name}: already in the queue as Slurm job {job}" in slurm.call(*call, cwd=tmp_path)

    trained(slurm, job, run, log)
    hours, minutes, _ = map(int, slurm.job(job)["RunTime"].split(":"))
    slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 2}")  # within its grace
    slurm.wait(job, "PENDING", log.read_text)
    stopped_at = steps(run)[-1]
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert "DUE TO TIME LIMIT" not in log.read_text()  # as Slurm says when it ends what it has asked to in vain
    assert Follower(run).look().state == "stopped"

    trained(slurm, job, run, log, stopped_at)
    assert gone_on_from(log) == stopped_at and Follower(run).look().state == "running"


def test_what_fails_or_is_cancelled_does_not_come_back(slurm, by_hand, shards, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    failed = slurm.wait(by_hand(run, f"data.shards={tmp_path / 'nothing'}", LONG), "FAILED", log.read_text)
    assert (failed["ExitCode"], failed["Restarts"]) == ("2:0", "0"), log.read_text()
    assert log.read_text().count("hpcm: ") == 1 and not run.exists()

    job = by_hand(run, f"data.shards={shards}", LONG)
    trained(slurm, job, run, log)
    slurm.call("scancel", job)
    await_that(lambda: job not in slurm.jobs().split(), log.read_text)
    assert (slurm.job(job)["JobState"], slurm.job(job)["Restarts"]) == ("CANCELLED", "0"), log.read_text()
    newest = max(path.name for path in (run / "checkpoints").glob("step_*"))
    assert int(newest.removeprefix("step_")) == steps(run)[-1]
