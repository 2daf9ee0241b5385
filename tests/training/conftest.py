"""Launches for the training tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def launch(shards, tmp_path_factory):
    """`launch(*overrides, processes=2, launcher=True, ...)`: a real training, in an empty working folder."""
    folder = tmp_path_factory.mktemp("runs")

    def start(*overrides: str, processes: int = 2, module: str = "hpcm_scale.train", wait: bool = True, **variables):
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        command = [sys.executable, "-m", module]
        if processes > 1:
            deepspeed = str(Path(sys.executable).with_name("deepspeed"))
            port = ["--master_port", str(free_port())]
            command = [deepspeed, "--num_gpus", str(processes), *port, "--module", module]
        process = subprocess.Popen(
            [*command, *overrides],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if not wait:
            return process
        stdout, stderr = process.communicate(timeout=400)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    start.folder = folder
    return start


@pytest.fixture(scope="session")
def train(launch, shards):
    """`train(run, *overrides, ...)`: a nano training that must succeed; returns its journal."""

    def start(run: str, *overrides: str, **options) -> list[dict]:
        result = launch(
            "model=nano",
            f"data.shards={shards}",
            "train.batch_size=4",
            "schedule.learning_rate=1e-3",
            f"run.dir={run}",
            *overrides,
            **options,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        start.output = result.stdout + result.stderr
        return journal(launch.folder / run)

    return start


def journal(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
