"""Processes that do not come, come with something else, or to the wrong place: one sentence, soon."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from watch_processes import PROBE, free_port

from hpcm_scale.distributed.processes import RankInfo, format_ranks
from hpcm_scale.distributed.rendezvous import difference

pytestmark = pytest.mark.launch

COMMAND = "run the same command on all nodes"


def test_a_process_that_never_comes_is_named(probes):
    ended = probes(4, "init_timeout=0.05", ranks=[0, 1]).end()
    assert ended.codes == [2, 2]
    host = socket.gethostname()
    assert ended.lines == [
        f"hpcm: ranks 2-3 of 4 did not connect within 0.05 minutes (ranks 0-1 from {host} did); "
        "start the missing node, or raise engine.init_timeout"
    ]


def test_nobody_at_the_address(probes):
    port = free_port()
    ended = probes(2, "init_timeout=0.02", ranks=[1], port=port).end()
    assert ended.codes == [2]
    assert f"got no response from rank 0 at 127.0.0.1:{port}" in ended.lines[-1]
    assert len(ended.lines) == 1


def test_a_port_in_use(probes):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = probes(1, port=port).end()
    assert ended.codes == [2]
    assert ended.lines == [
        f"hpcm: port {port} of this node is in use; choose another with --master_port (or MASTER_PORT)"
    ]


def test_two_runs_on_one_port_do_not_mix(probes):
    port = free_port()
    first = probes(2, "steps=400", port=port)
    first.await_line("process 0 is at step 2")
    second = probes(2, port=port).end()
    assert second.codes == [2, 2]
    assert all("hpcm: port" in line and "use" in line for line in second.lines)
    assert first.end().codes == [0, 0]


def test_other_settings_are_named(probes):
    ended = probes(3, own={2: ["fact=6"]}).end()
    assert ended.codes == [2, 2, 2]
    assert len(ended.lines) == 1
    assert ended.lines[0].startswith("hpcm: rank 2 (pid ")
    assert "has train.steps=6, but rank 0 (pid " in ended.lines[0] and ended.lines[0].endswith(f"has 5; {COMMAND}")


def test_nobody_is_left_behind_where_there_is_nothing_to_do(probes):
    ended = probes(3, "finished=").end()
    assert ended.codes == [0, 0, 0]
    assert sorted(ended.lines) == [f"process {rank} has nothing to do" for rank in range(3)]


@pytest.mark.parametrize("who", [0, 1])
def test_what_one_process_is_refused_for_ends_all_soon(probes, who):
    ended = probes(2, "refused=no shards", f"who={who}", "init_timeout=60").end()
    assert ended.codes == [2, 2]
    assert len(ended.lines) == 1
    assert ended.lines[0].startswith(f"hpcm: rank {who} (pid ") and ended.lines[0].endswith("): no shards")


def test_what_all_are_refused_for_is_said_once_and_at_once(probes):
    ended = probes(2, "refused=no shards", "init_timeout=60").end()
    assert (ended.codes, ended.lines) == ([2, 2], ["hpcm: no shards"])


LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"],
    "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "critical", "--num_gpus", "2"],
}


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.long)])
def test_both_engines_train_in_the_group_that_was_joined(launcher, tmp_path):
    """Whose limits of time are longer than those of the watch, in DeepSpeed's groups too; it is left in silence."""
    probe = Path(__file__).with_name("group_probe.py")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"DS_ACCELERATOR": "cpu"} | ({"OMP_NUM_THREADS": "1"} if launcher == "torchrun" else {})
    done = subprocess.run(
        [*LAUNCHERS[launcher], "--master_port", str(free_port()), str(probe)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = [line for line in done.stdout.splitlines() if line.startswith("group")]
    assert sorted(said) == [
        *(f"group {rank} {what}" for rank in (0, 1) for what in ("at the end: False", f"waits: {[95.0] * 4}")),
        *(f"group {engine} {rank} of 2: same, threads: 1" for engine in ("accelerate", "deepspeed") for rank in (0, 1)),
    ]


def test_a_process_started_by_hand_for_many_without_an_address(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    done = subprocess.run(
        [sys.executable, str(PROBE)],
        env=environment | {"RANK": "0", "WORLD_SIZE": "2"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("hpcm: RANK is set but MASTER_ADDR is not")


def test_differences_are_found_at_any_depth():
    ranks = [RankInfo(rank, "host", rank, 0.0) for rank in range(3)]
    same = {"version": {"torch": "2.13.0"}, "setting": {"train": {"steps": 5, "betas": [0.9, 0.99]}}}
    assert difference(ranks, [same, same, same]) is None
    other = same | {"setting": {"train": {"steps": 5, "betas": [0.9, 0.9]}}}
    error = difference(ranks, [same, same, other])
    assert (error.code, error.key) == ("ranks-differ", "train.betas")
    assert str(error).startswith("rank 2 (pid 2 on host) has train.betas=[0.9, 0.9]")
    older = same | {"version": {"torch": "2.9.0"}}
    error = difference(ranks, [same, older, other])
    assert error.key == "torch" and str(error).endswith("has 2.13.0; install the same versions on all nodes")


def test_format_ranks():
    assert format_ranks([3]) == "rank 3"
    assert format_ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"
