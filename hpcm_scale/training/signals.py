"""Being asked to stop: by a signal, a file, or the clock."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil

from hpcm_scale.errors import STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONCE_SECONDS = 2.0
"""Signals so close together are one: launchers pass on to each process what its whole group has got already."""
LOOK_SECONDS = 1.0
"""Least time between two looks for the stop file."""


class StopRequest:
    """Whether this process has been asked to stop; the loop agrees on it with the others.

    By SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 (Slurm), of which a second one ends the process at once, and so does the
    first one before `listen` is called, for there is nothing to be saved; by `file`, looked for by the first process
    and removed when it is obeyed; or by the time: `hours` after `began`, in seconds since 1970, which is the start of
    this process unless given.
    """

    def __init__(self, file: Path, hours: float | None = None, first: bool = True, began: float | None = None) -> None:
        self.reason = ""
        """Empty: it has not."""
        self._file = file if first else None
        self._looked = 0.0
        age = time.time() - (psutil.Process().create_time() if began is None else began)
        self._end = time.monotonic() + hours * 3600 - age if hours else None
        self._hours = hours
        self._listening = False
        self._signalled: float | None = None
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def listen(self) -> None:
        """From now on signals are noted: there is a loop that asks for them."""
        self._listening = True

    def request(self, reason: str) -> None:
        """Ask it to."""
        self.reason = self.reason or reason

    def received(self) -> bool:
        """Whether it has been asked to by now."""
        now = time.monotonic()
        if self._end is not None and now > self._end:
            self.request(f"train.max_hours={self._hours:g} are over")
        if self._file is not None and now > self._looked + LOOK_SECONDS:
            self._looked = now
            if self._file.exists():
                self.request(f"{self._file} is there")
        return bool(self.reason)

    def close(self) -> None:
        """Give the signals back; a stop file that was obeyed goes."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._file is not None and self.reason:
            self._file.unlink(missing_ok=True)

    def _note(self, number: int, frame: object) -> None:
        if not self._listening:
            raise SystemExit(STOPPED)
        now = time.monotonic()
        if self._signalled is not None and now > self._signalled + ONCE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signalled = self._signalled or now
        self.request(f"{signal.Signals(number).name}")
