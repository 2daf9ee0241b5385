"""The processes of one job: one `deepspeed` in a session of its own, which ends as a whole."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from hpcm_scale.sweeps.log import ended, group_members, started, starting

_LAUNCHER = "deepspeed.launcher."
"""In the command line of DeepSpeed's own two processes of a job."""


class JobProcess:
    """Starts `command`; what its processes say is appended to `log`.

    Asked to end, they have `grace` seconds before they are killed. Raises BlockingIOError where processes that
    another call started write this log still.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str], grace: float) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("ab", buffering=0)
        self._lock()
        self._log.write(starting(command).encode(errors="surrogateescape"))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us, who ask it to stop in good order
        )
        self._log.write(started(self._process.pid).encode())
        self._grace = grace
        self._asked: float | None = None
        self._stopping = False

    def poll(self) -> int | None:
        """The exit code, negative for a signal, once all of the job's processes have ended; before that None."""
        code = self._process.poll()
        if self._asked is not None and time.monotonic() > self._asked + self._grace:
            self._kill()
        if code is None:
            return None
        if group_members(self._process.pid):  # deepspeed itself was ended from outside: so is what it started
            if self._asked is None:  # asked again, training ends without a checkpoint
                self._ask()
            return None
        if not self._log.closed:
            self._log.write(ended(code, asked=self._stopping).encode())
            self._log.close()
        return code

    def stop(self) -> None:
        """Ask the training processes to leave a checkpoint and end."""
        self._stopping = True
        self._ask()

    def kill(self) -> None:
        """End all of the job's processes at once."""
        self._stopping = True
        self._kill()

    def _lock(self) -> None:
        """The lock on the log is this job's as long as any of its processes lives: they all inherit it."""
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._log.close()
            raise
        except OSError:
            pass  # a file system without locks

    def _ask(self) -> None:
        """SIGTERM to the training processes; DeepSpeed's own two then end with them.

        Sent to DeepSpeed's launcher, it would have it kill after 30 s what still writes a checkpoint.
        """
        self._asked = self._asked or time.monotonic()
        members = group_members(self._process.pid)
        training = [process for process in members if not _is_launcher(process)]
        for process in training or members:
            with suppress(psutil.Error):
                process.terminate()

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _is_launcher(process: psutil.Process) -> bool:
    try:
        return any(argument.startswith(_LAUNCHER) for argument in process.cmdline())
    except psutil.Error:
        return False
