"""Real multiruns on the CPU: killed, failing, interrupted, finished by the same command."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fork_server import Forked
from small_training import SMALL

from hpcm_scale.config.compose import compose, to_yaml
from hpcm_scale.errors import STOPPED
from hpcm_scale.sweeps.status import Follower

pytestmark = pytest.mark.launch

COMMON = (*SMALL[1:], "train.batch_size=2", "train.checkpoint_every=1", "engine=accelerate")
"""But for the model, which is swept."""
SWEEP = Path("runs") / "sweep_model"


def steps(run: Path) -> list[int]:
    """The steps in a run's journal so far."""
    journal = run / "metrics.jsonl"
    text = journal.read_text() if journal.is_file() else ""
    return [json.loads(line)["step"] for line in text[: text.rfind("\n") + 1].splitlines()]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def wait_for(condition: Callable[[], object], process: Forked) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)


def obstacle(run: Path, shards: Path, *overrides: str) -> Path:
    """Make a run fail that nothing is wrong with: where its journal should be there is a folder."""
    run.mkdir(parents=True)
    config = compose([*overrides, f"data.shards={shards}", *COMMON, f"run.dir='{run.name}'"])
    (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (run / "metrics.jsonl").mkdir()
    return run / "metrics.jsonl"


def contents(run: Path) -> dict[str, int]:
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.fixture
def start(shards, fork_server, tmp_path) -> Callable[..., Forked]:
    """`start(*arguments)`: the command in a process of its own."""

    def call(*arguments: str) -> Forked:
        words = [*arguments, f"data.shards={shards}", *COMMON]
        return fork_server.start("hpcm_scale.train", words, cwd=tmp_path, env=os.environ)

    return call


SEVERAL = ("-m", "model=nano,micro", "hydra/launcher=deepspeed", "hydra.launcher.jobs_at_once=2")
STEPS = 40
"""Of a run: enough to kill one that has begun."""


@pytest.mark.long
def test_interrupted_all_runs_write_a_checkpoint(start, tmp_path, exit_codes):
    """With DeepSpeed's launcher; test_sweeps_processes has stand-ins for it."""
    runs = [tmp_path / SWEEP / f"model={name}" for name in ("nano", "micro")]
    process = start(*SEVERAL, "train.steps=5000")
    wait_for(lambda: all(steps(run) for run in runs), process)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 6  # of each run: deepspeed, its launcher, training
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=400)
    assert process.returncode == STOPPED and "sweep" in exit_codes[str(STOPPED)], output + errors
    assert psutil.wait_procs(children, timeout=60)[1] == []
    for run in runs:
        assert max((run / "checkpoints").iterdir()).name == f"step_{steps(run)[-1]:08d}"
        assert f"{run.name}: stopped at step {steps(run)[-1]:,} of 5,000" in output
        assert Follower(run).look().state == "stopped"
        assert run.with_name(f"{run.name}.log").read_text().endswith(f"ended with exit code {STOPPED}, as asked\n")


def test_one_is_killed_and_the_same_command_finishes_what_is_missing(start, shards, train, tmp_path):
    runs = nano, micro = [tmp_path / SWEEP / f"model={name}" for name in ("nano", "micro")]
    assert start("model=nano", f"train.steps={STEPS}", f"run.dir='{nano.relative_to(tmp_path)}'").wait(400) == 0
    assert Follower(nano).look().state == "finished"

    before = contents(nano)
    process = start(*SEVERAL, f"train.steps={STEPS}")
    wait_for(lambda: steps(micro), process)
    ranks = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "model=micro" in child.cmdline()
    ]
    ranks[-1].kill()
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 1, output + errors
    state = Follower(micro).look()
    assert state.state == "failed" and "SIGKILL" in state.note
    assert "model=micro: failed: " in output and "1 of 2 runs are not finished" in output

    code, output, errors = train(*SEVERAL, f"train.steps={STEPS}", f"data.shards={shards}", *COMMON)
    assert code == 0, output + errors
    assert contents(nano) == before  # nothing was started for it
    assert output.count(": started on") == 1 and "model=nano: started" not in output
    assert steps(nano) == steps(micro) == list(range(1, STEPS + 1))
    rows = [line.split() for line in output.splitlines() if line.strip().startswith("model=") and f"/{STEPS}" in line]
    assert [(row[0], row[3], row[-1]) for row in rows] == [(run.name, f"{STEPS}/{STEPS}", "finished") for run in runs]


def test_without_a_launcher_one_after_the_other_and_one_failing(start, shards, tmp_path):
    failing, whole = (tmp_path / SWEEP / f"model={name}" for name in ("nano", "450k"))
    obstacle(failing, shards, "model=nano", "train.steps=2")

    def train(*changes: str) -> None:
        process = start("-m", "model=nano,450k", "train.steps=2", *changes)
        output, errors = process.communicate(timeout=400)
        assert process.returncode == 1 and "IsADirectoryError" in errors, output + errors
        assert "model=nano: [Errno 21] Is a directory" in " ".join(output.split())

    train("train.max_hours=1e-6")  # the second one is asked to stop: that does not hide that the first one failed
    assert steps(whole) == [1]
    train()
    assert steps(whole) == [1, 2] and Follower(whole).look().state == "finished"
