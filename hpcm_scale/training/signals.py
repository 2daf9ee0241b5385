"""Signals, garbage collection and deterministic mode of a training process."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from hpcm_scale.errors import STOPPED

# Being asked to stop: by a signal, a file, or the clock.


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


# Python's garbage collection between steps, not within them: there it would keep one process, and so all, waiting.


EVERY = 100
"""Steps from one collection to the next; every tenth is of everything."""


@contextmanager
def collecting_between_steps() -> Iterator[Callable[[int], None]]:
    """Within it nothing is collected but by what it gives: a function to call after each step, with its number.

    All processes call it at the same steps, and so wait together.
    """

    def after(step: int) -> None:
        if step % EVERY == 0:
            gc.collect(2 if step % (10 * EVERY) == 0 else 1)

    enabled = gc.isenabled()
    gc.disable()
    try:
        yield after
    finally:
        if enabled:
            gc.enable()


# torch's deterministic algorithms, for the length of one run.


WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable of cuBLAS, without one of two values of which torch refuses its products."""


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Within, use algorithms that give the same result every time, if `enabled`; restore all settings afterwards.

    On CUDA that covers cuDNN, cuBLAS, attention and torch's own kernels. An operation that has no such algorithm raises
    RuntimeError. It must not only warn: attention looks for its deterministic backward pass in the strict mode alone.
    Enter it before the first operation on a GPU, since cuBLAS reads the environment then.
    """
    if not enabled:
        yield
        return
    cudnn, filling = torch.backends.cudnn, torch.utils.deterministic
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(WORKSPACE)
    before = cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory
    os.environ[WORKSPACE] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    filling.fill_uninitialized_memory = False  # nothing reads memory before it is written
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        if workspace is None:
            del os.environ[WORKSPACE]
        else:
            os.environ[WORKSPACE] = workspace
