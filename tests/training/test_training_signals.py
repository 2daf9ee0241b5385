"""Being asked to stop: signals, a file, the clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from hpcm_scale.errors import STOPPED
from hpcm_scale.training import signals
from hpcm_scale.training.signals import SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_given_back(number, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "ONCE_SECONDS", 600.0)
    before = signal.getsignal(number)
    request = StopRequest(tmp_path / "stop")
    request.listen()
    assert not request.received()
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # at once: the same one, passed on by a launcher
    assert request.received() and request.reason == signal.Signals(number).name
    request.close()
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_at_once():
    program = (
        "import os, pathlib, signal, time; from hpcm_scale.training import signals; signals.ONCE_SECONDS = 0.1;"
        "request = signals.StopRequest(pathlib.Path('stop')); request.listen();"
        "os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2); print(request.received(), flush=True);"
        "os.kill(os.getpid(), signal.SIGUSR1); time.sleep(9); print('still here')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=400)
    assert result.stdout == "True\n" and result.returncode == -signal.SIGUSR1, result.stderr


def test_before_training_a_signal_ends_at_once(tmp_path):
    request = StopRequest(tmp_path / "stop")
    with pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert end.value.code == STOPPED
    request.close()


def test_the_stop_file_is_obeyed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "FILE_CHECK_SECONDS", 0.0)
    file = tmp_path / "stop"
    request, other = StopRequest(file), StopRequest(file, first=False)
    assert not request.received()
    file.touch()
    assert request.received() and not other.received()
    other.close()
    assert file.exists()
    request.close()
    assert not file.exists()


def test_the_time_runs_out(tmp_path, monkeypatch):
    for age, over in ((0, False), (3601, True)):
        with monkeypatch.context() as patched:
            patched.setattr(psutil.Process, "create_time", lambda process, age=age: time.time() - age)
            request = StopRequest(tmp_path / "stop", hours=1)
        assert request.received() == over and ("train.max_hours" in request.reason) == over
        request.close()
    request = StopRequest(tmp_path / "stop", hours=1e-6)
    assert request.received()  # this process has been running for longer: of several trainings, too
    request.close()
