"""Only one training at a time writes a run folder."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from hpcm_scale.errors import UserError
from hpcm_scale.training.run_folder import RunFolder, RunLock


def test_a_second_training_waits_and_then_names_the_holder(probes, tmp_path):
    held = tmp_path / "run"
    first = probes(2, f"folder={held}", "lock=1", "steps=100000")
    pid = first.await_line("process 0 is at step 2").split()[-1]
    second = probes(2, f"folder={held}", "lock=1").end()
    holder = f"process {pid} on {socket.gethostname()}"
    assert second.codes == [2, 2]
    assert second.lines == [
        f"{held} is still in use by {holder}: waiting for it to end",
        f"hpcm: {held} is being trained by {holder}; stop it, or choose another run.dir",
    ]
    third = probes(2, f"folder={held}", "lock=60")
    third.await_line("waiting for it to end")
    os.kill(int(pid), signal.SIGKILL)
    assert third.end().codes == [0, 0]
    assert first.end().codes == [-9, 1]


def test_a_lock_is_given_back(tmp_path):
    lock = RunLock(RunFolder(tmp_path / "run"), seconds=0)
    with pytest.raises(UserError) as error:
        RunLock(RunFolder(tmp_path / "run"), seconds=0)
    assert error.value.code == "run-locked" and f"process {os.getpid()} on" in str(error.value)
    lock.release()
    RunLock(RunFolder(tmp_path / "run"), seconds=0).release()


def test_a_folder_that_cannot_be_made_is_reported_in_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/run \(Not a directory\)"):
        RunLock(RunFolder(tmp_path / "file" / "run"), seconds=0)
