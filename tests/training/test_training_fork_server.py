"""What the other tests here rest on: a forked process is what a fresh one is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import psutil
import pytest

pytestmark = pytest.mark.launch

OTHER = {"MASTER_PORT", "CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK", "CROSS_RANK", "CROSS_SIZE"}
"""Variables that differ from launch to launch, are for GPUs, or tell training to look after DeepSpeed's launcher."""


@pytest.fixture
def probe(launch, project):
    """`probe(ending, ...)`: the process that `launch(…)` gives, running the probe."""
    path = str(project / "tests" / "training")

    def start(*arguments: str, **options):
        return launch(*arguments, module="fresh_probe", PYTHONPATH=path, NO_SUCH_VARIABLE="ä b", **options)

    return start


LAST_WORDS = {
    "whole": ["at exit"],
    "message": ["at exit"],
    "code": ["at exit"],
    "failure": ["at exit"],
    "busy": ["of a thread", "at exit"],
    "killed": [],
    "interrupted": ["at exit"],
}


@pytest.mark.parametrize("ending", LAST_WORDS)
def test_a_forked_process_is_and_ends_as_a_fresh_one(ending, probe):
    forked, fresh = (probe(ending, processes=1, launcher=launcher) for launcher in (False, True))
    ours, theirs = (result.stdout.splitlines() for result in (forked, fresh))
    assert json.loads(ours[0]) == json.loads(theirs[0])
    assert forked.returncode == fresh.returncode
    assert ours[1:] == theirs[1:] == LAST_WORDS[ending]
    assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_forked_processes_have_the_environment_of_the_launcher(probe):
    def ranks(launcher: bool) -> dict[str, dict]:
        """What each process found; the launcher itself writes other lines."""
        output = probe("whole", launcher=launcher).stdout
        found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        for facts in found:
            facts["environment"] = {key: facts["environment"][key] for key in facts["environment"].keys() - OTHER}
        return {facts["environment"]["RANK"]: facts for facts in found}

    forked, fresh = ranks(False), ranks(True)
    assert forked.keys() == {"0", "1"}
    assert forked == fresh


def wait_for(pid: int, children: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 300
    while len(found := psutil.Process(pid).children()) < children:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_one_of_several_that_fails_ends_the_others(number, probe):
    process = probe("asleep", wait=False)
    one, other = wait_for(process.pid, 2)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.1)
    one.send_signal(number)
    assert process.wait(timeout=300) == 256 - number
    assert psutil.wait_procs([one, other], timeout=60)[1] == []


@pytest.mark.parametrize("everyone", [False, True])
def test_signals_reach_all(everyone, probe):
    """Sent to the process group, or only to the one that waits."""
    process = probe("asleep", wait=False)
    ranks = wait_for(process.pid, 2)
    (os.killpg if everyone else os.kill)(process.pid, signal.SIGTERM)
    process.wait(timeout=300)
    assert psutil.wait_procs(ranks, timeout=60)[1] == []
