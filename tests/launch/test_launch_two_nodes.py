"""Two nodes without ssh, on loopback: one run, stopped on one node, gone on with; ended when a node is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from small_training import SMALL

from hpcm_scale.errors import STOPPED

pytestmark = pytest.mark.launch

COMMON = (*SMALL, "engine=accelerate", "engine.precision=fp32", "schedule=constant", "train.steps=5000")
MODULE = "hpcm_scale.train"
COMPARED = ("step", "train/images", "compute/pflops", "train/loss", "train/bpp", "train/psnr", "train/grad_norm")
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
NODES = ("localhost", "127.0.0.1")


class Nodes:
    """The commands that are typed on each node, at work at the same time."""

    def __init__(self, commands: Sequence[Sequence[str | Path]], folder: Path, variables: dict[str, str]) -> None:
        self.logs = [folder / f"node_{rank}.log" for rank in range(len(commands))]
        self.processes = []
        for rank, (command, log) in enumerate(zip(commands, self.logs, strict=True)):
            with log.open("w") as output:
                process = subprocess.Popen(
                    list(map(str, command)),
                    cwd=folder,
                    env=os.environ | variables | {"NODE_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.processes.append(process)

    def said(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 400
        while not condition():
            ended = [process.returncode for process in self.processes if process.poll() is not None]
            assert time.monotonic() < deadline and not ended, self.said()
            time.sleep(0.02)

    def codes(self, seconds: float) -> list[int]:
        """Their exit codes, all within so long."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.0, deadline - time.monotonic())) for process in self.processes]

    def kill(self, rank: int) -> None:
        """All processes of a node at once, as when its power fails: `deepspeed` has a process group of its own."""
        session = self.processes[rank].pid
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == session:
                    process.kill()


@pytest.fixture
def start(checkout, active, tmp_path, shards) -> Iterator[Callable[..., Nodes]]:
    """`start(command, *changes)`: `command` with the changes on both nodes, in the folder of a hostfile."""
    (checkout / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NODES), encoding="utf-8")
    (active / "bin/deepspeed").symlink_to(Path(sys.executable).with_name("deepspeed"))
    with socket.create_server((NODES[1], 0)) as probe:
        port = str(probe.getsockname()[1])
    variables = {**CPU, "VIRTUAL_ENV": str(active)}
    variables |= {"MASTER_ADDR": NODES[1], "MASTER_PORT": port}
    started: list[Nodes] = []

    def both(command: Callable[[int, str], Sequence[str | Path]], *changes: str) -> Nodes:
        words = overrides(shards, tmp_path / "run", *changes)
        started.append(Nodes([[*command(rank, port), *words] for rank in range(2)], checkout, variables))
        return started[-1]

    yield both
    for nodes in started:
        for rank, process in enumerate(nodes.processes):
            nodes.kill(rank)
            process.wait()


def overrides(shards: Path, run: Path, *changes: str) -> list[str]:
    return [*COMMON, f"data.shards={shards}", f"run.dir={run}", *changes]


def script(rank: int, port: str) -> list[str | Path]:
    return ["bash", "launch/many_nodes.sh"]


def typed(rank: int, port: str) -> list[str | Path]:
    launcher = Path(sys.executable).with_name("deepspeed")
    where = ("--master_addr", NODES[1], "--master_port", port)
    return [launcher, "--no_ssh", "--node_rank", str(rank), "--hostfile", "hostfile", *where, "--module", MODULE]


def journal(run: Path) -> list[list[float]]:
    """What the lines of a journal have that does not depend on the time."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [[line[key] for key in COMPARED] for line in lines]


def test_two_nodes_are_one_run_that_stops_and_goes_on(start, shards, fork_server, tmp_path):
    run, one_node = tmp_path / "run", tmp_path / "one_node"
    nodes = start(script)
    nodes.wait_for(lambda: len(journal(run)) > 3)
    nodes.processes[1].terminate()  # the script alone, as a supervisor does
    assert nodes.codes(400) == [STOPPED, STOPPED], nodes.said()
    stopped_at = len(journal(run))
    assert max((run / "checkpoints").glob("step_*")).name == f"step_{stopped_at:08d}"
    last = nodes.logs[0].read_text().splitlines()[-1]  # the other may write nothing
    assert "the same command resumes it" in last, nodes.said()

    for folder in (one_node, run):  # the second one goes on
        words = overrides(shards, folder, f"train.stop_after={stopped_at + 1}")
        process = fork_server.start(MODULE, words, cwd=tmp_path, env=os.environ | CPU, processes=2)
        said = process.communicate(400)
        assert process.returncode == 0, said
    assert f"resuming from step {stopped_at}" in "".join(said)
    assert journal(one_node) == journal(run) and len(journal(run)) == stopped_at + 1


@pytest.mark.long
def test_a_node_that_is_lost_ends_the_other_one(start, tmp_path):
    """As the documents have it without the script."""
    nodes = start(typed)
    nodes.wait_for(lambda: len(journal(tmp_path / "run")) > 1)
    nodes.kill(1)
    code, killed = nodes.codes(400)
    assert killed == -signal.SIGKILL and code not in (0, STOPPED), nodes.said()
