"""Launches for the training tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from small_training import ALL_SHARDED, SMALL
from watch_processes import Probes, free_port


@pytest.fixture
def probes(fork_server, tmp_path):
    """`probes(processes, *arguments, …)`: Probes in an empty working folder."""
    return partial(Probes, fork_server, tmp_path)


@pytest.fixture(scope="session")
def launch(shards, fork_server, tmp_path_factory):
    """`launch(*overrides, processes=2, launcher=False, ...)`: a real training, in an empty working folder.

    Its processes are forked, which spares them the imports; with `launcher=True` they are started as a user starts
    them.
    """
    folder = tmp_path_factory.mktemp("runs")

    def start(
        *overrides: str,
        processes: int = 2,
        module: str = "hpcm_scale.train",
        wait: bool = True,
        launcher: bool = False,
        **variables,
    ):
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        environment = {name: value for name, value in environment.items() if value is not None}
        if "engine=zero3" in overrides:
            overrides = (*overrides, *ALL_SHARDED)
        if launcher:
            process = started(module, overrides, processes, folder, environment)
        else:
            process = fork_server.start(module, overrides, cwd=folder, env=environment, processes=processes)
        if not wait:
            return process
        stdout, stderr = process.communicate(timeout=400)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    start.folder = folder
    return start


def started(module: str, arguments: tuple[str, ...], processes: int, cwd: Path, env: dict) -> subprocess.Popen[str]:
    """The module as its user starts it."""
    command = [sys.executable, "-m", module]
    if processes > 1:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        port = ["--master_port", str(free_port())]
        command = [deepspeed, "--num_gpus", str(processes), *port, "--module", module]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *arguments], cwd=cwd, env=env, start_new_session=True, **streams)


@pytest.fixture(scope="session")
def train(launch, shards):
    """`train(run, *overrides, ...)`: a `SMALL` training that must succeed; returns its journal."""

    def start(run: str, *overrides: str, **options) -> list[dict]:
        result = launch(*SMALL, f"data.shards={shards}", f"run.dir={run}", *overrides, **options)
        assert result.returncode == 0, result.stdout + result.stderr
        start.output = result.stdout + result.stderr
        return journal(launch.folder / run)

    return start


def journal(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
