"""Whatever happens to one process, all end, and the last line says what it was."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import psutil
import pytest
from watch_processes import PROBE, await_line, free_port

from hpcm_scale.distributed.heartbeat import location, summarize

pytestmark = pytest.mark.launch


def test_an_exception_of_one_ends_all_and_is_said_last_and_once(probes):
    ended = probes(2, "does=raise", "who=1").end()
    assert ended.codes == [1, 1]
    assert ended.lines[-1].endswith("ArithmeticError: one and one is three")
    assert sum("Traceback" in line for line in ended.lines) == 1


@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_process_is_named(probes, who):
    ended = probes(3, "does=kill", f"who={who}").end()
    assert ended.codes == [-9 if rank == who else 1 for rank in range(3)]
    pid = re.search(rf"process {who} is at step 2, pid (\d+)", "\n".join(ended.lines))[1]
    assert ended.lines[-1].startswith(f"hpcm: rank {who} (pid {pid} on ")
    assert "was killed, probably because memory ran out" in ended.lines[-1]
    assert not any("Traceback" in line or "gloo" in line for line in ended.lines)


def test_a_mistake_that_one_process_meets_is_the_last_line(probes):
    ended = probes(2, "does=mistake", "who=1").end()
    assert (ended.codes, ended.lines[-1]) == ([2, 2], "hpcm: the shards are gone")


def test_a_mistake_that_all_meet_is_reported_once_and_at_once(probes):
    ended = probes(2, "does=all_mistake").end()
    assert ended.codes == [2, 2]
    assert [line for line in ended.lines if "hpcm" in line] == ["hpcm: the loss is not finite"]


def test_a_mistake_that_one_process_takes_for_common_ends_all(probes):
    ended = probes(2, "does=one_mistake", "who=1").end()
    assert (ended.codes, ended.lines[-1]) == ([2, 2], "hpcm: the loss is not finite")


def test_a_process_that_does_nothing_any_more_is_noticed_by_its_silence(probes):
    """It is left alone: once it goes on, it ends as the others did."""
    all_three = probes(3, "does=freeze", "who=1", "lost_seconds=5")
    _, frozen, _ = all_three.processes
    assert [all_three.processes[rank].wait(300) for rank in (0, 2)] == [1, 1]
    assert re.search(r"rank 1 \(pid \d+ on .*\) has sent no heartbeat for 5 s", all_three.said()[-1])
    assert frozen.poll() is None
    frozen.send_signal(signal.SIGCONT)
    assert all_three.end().codes == [1, 1, 1]


@pytest.mark.long
def test_a_process_whose_interpreter_is_held_ends_by_itself(probes):
    """Nobody kills it; what ends it is a timer of its own, and stack traces say where it was."""
    ended = probes(2, "does=hold", "who=1", "lost_seconds=5", "stall_seconds=25", "stuck_seconds=15").end()
    assert ended.codes == [1, 1]
    assert any(re.search(r"rank 1 \(pid \d+ on .*\) has sent no heartbeat for 5 s", line) for line in ended.lines)
    timed_out = ended.lines.index("Timeout (0:00:40)!")
    assert any("watch_probe.py" in line and line.endswith("in fail") for line in ended.lines[timed_out:])


def test_a_process_that_was_held_for_a_while_does_not_take_the_others_for_lost(probes):
    ended = probes(2, "does=hold_for_8", "who=1", own={1: ["lost_seconds=3"]}).end()
    assert ended.codes == [0, 0]
    assert sum("is done: 2 added up" in line for line in ended.lines) == 2


class Held:
    """A tensor whose device is not done; its methods are C, and have no frames."""

    def tolist(self) -> str:
        return location(traceback.extract_stack()[:-1])


def test_who_reads_a_value_off_the_device_waits_for_the_others():
    """As under NCCL, where the collective itself returns at once."""
    waits = Held().tolist()
    assert re.match(r"test_\w+ \(test_training_watch\.py:\d+\) at \.tolist\(\) < ", waits)
    assert " at " not in location(traceback.extract_stack())
    reads = "read (storage.py:3) < deliver (stream.py:200)"
    gloo = "all_reduce (distributed_c10d.py:3000) < reduce (deepspeed_engine.py:137)"
    assert summarize({0: waits, 1: reads, 2: gloo}) == "rank 1 is in read (storage.py:3)"
    assert summarize({0: waits, 1: waits}) == f"ranks 0-1 are in {waits.partition(' < ')[0]}"


def test_a_stall_leaves_stack_traces_of_all_and_names_where_it_hangs(probes, tmp_path):
    ended = probes(2, "does=sleep", "who=1", "stall_seconds=3").end()
    assert ended.codes == [1, 1]
    assert re.fullmatch(
        r"hpcm: no step for 0.05 minutes after step 2 \(rank 1 is in fail \(watch_probe.py:\d+\)\); "
        r"stack traces: stacks; raise train.watchdog_timeout if a step takes that long",
        ended.lines[-1],
    )
    assert any(re.search(r"rank 0: all_reduce .*train \(watch_probe.py", line) for line in ended.lines)
    assert "in fail" in (tmp_path / "stacks" / "rank_00001.txt").read_text()
    assert "in all_reduce" in (tmp_path / "stacks" / "rank_00000.txt").read_text()


def test_an_interrupted_process_takes_the_others_along_without_a_word(probes):
    ended = probes(2, "does=interrupt", "who=1").end()
    assert ended.codes == [130, 130]
    assert not any("Traceback" in line or "hpcm" in line for line in ended.lines)


@pytest.mark.parametrize("late", [0, 1])
def test_nobody_is_missed_that_ends_before_or_after_the_others(probes, late):
    ended = probes(2, f"late={late}", "times=2", "steps=3", "pause=0").end()
    assert ended.codes == [0, 0]
    assert sum("is done: 2 added up" in line for line in ended.lines) == 4
    assert not any("hpcm" in line for line in ended.lines)


def test_the_end_is_watched_too(probes):
    both = probes(2, "late=0", "steps=2")
    pid = int(both.await_line("process 0 is at step 2").split()[-1])
    os.kill(pid, signal.SIGKILL)
    ended = both.end()
    assert ended.codes == [-9, 1]
    assert "rank 0 (pid" in ended.lines[-1]


def test_one_process_alone_ends_as_ever(probes):
    ended = probes(1, "does=raise", "who=0").end()
    assert (ended.codes, ended.lines[-1].split("]:")[-1].strip()) == ([1], "ArithmeticError: one and one is three")


def _deepspeed(folder: Path, *arguments: str) -> tuple[subprocess.Popen, Path]:
    log = folder / "log.txt"
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "critical", "--num_gpus", "2"]
    with log.open("w", encoding="utf-8") as handle:
        process = subprocess.Popen(
            [*launcher, "--master_port", str(free_port()), str(PROBE), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            cwd=folder,
            stdout=handle,
            stderr=handle,
        )
    return process, log


def test_the_cause_is_the_last_line_under_deepspeed(tmp_path):
    process, log = _deepspeed(tmp_path, "does=kill", "who=1")
    process.wait(300)
    lines = log.read_text().splitlines()
    assert lines[-1].startswith("hpcm: rank 1 (pid ") and "was killed" in lines[-1]


@pytest.mark.parametrize("whom", ["deepspeed", pytest.param("launch.py", marks=pytest.mark.long)])
def test_processes_whose_launcher_is_killed_stop_in_good_order(tmp_path, whom):
    process, log = _deepspeed(tmp_path, "steps=100000", "pause=0.05")
    said = lambda: log.read_text().splitlines()  # noqa: E731
    pids = [int(await_line(said, f"process {rank} is at step 2").split()[-1]) for rank in (0, 1)]
    ranks = [psutil.Process(pid) for pid in pids]
    victim = process if whom == "deepspeed" else ranks[0].parent()
    victim.kill()
    _, alive = psutil.wait_procs(ranks, timeout=300)
    for rank in alive:
        rank.kill()
    process.wait(300)
    assert not alive
    stops = [line for line in said() if "stops at step" in line]
    assert len(stops) == 2 and any("launcher has exited" in line for line in stops)
