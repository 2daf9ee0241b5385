"""Signals, garbage collection and deterministic mode of a training process."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from hpcm_scale.errors import STOPPED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONCE_SECONDS = 2.0
"""Signals so close together count once: launchers forward signals that the whole process group has received."""
FILE_CHECK_SECONDS = 1.0
"""Interval between checks for the stop file."""


class StopRequest:
    """Whether this process is asked to stop; the loop sums the requests over all ranks.

    A request is SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 (Slurm), the file `file`, which rank 0 checks for and removes, or
    the end of `hours` after the start of this process. A second signal ends the process at once, as does any signal
    before `listen`, when there is nothing to save.
    """

    def __init__(self, file: Path, hours: float | None = None, first: bool = True) -> None:
        self.reason = ""
        """Why it is asked to stop; "" if it is not."""
        self._file = file if first else None
        self._checked = 0.0
        age = time.time() - psutil.Process().create_time()
        self._end = time.monotonic() + hours * 3600 - age if hours else None
        self._hours = hours
        self._listening = False
        self._signalled: float | None = None
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def listen(self) -> None:
        """From now on signals are requests to stop, since a loop checks for them."""
        self._listening = True

    def request(self, reason: str) -> None:
        """Ask this process to stop."""
        self.reason = self.reason or reason

    def received(self) -> bool:
        """Whether this process has been asked to stop."""
        now = time.monotonic()
        if self._end is not None and now > self._end:
            self.request(f"train.max_hours={self._hours:g} have passed")
        if self._file is not None and now > self._checked + FILE_CHECK_SECONDS:
            self._checked = now
            if self._file.exists():
                self.request(f"{self._file} exists")
        return bool(self.reason)

    def close(self) -> None:
        """Restore the signal handlers and remove an obeyed stop file."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._file is not None and self.reason:
            self._file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: object) -> None:
        if not self._listening:
            raise SystemExit(STOPPED)
        now = time.monotonic()
        if self._signalled is not None and now > self._signalled + ONCE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signalled = self._signalled or now
        self.request(f"{signal.Signals(number).name}")


COLLECT_EVERY = 100
"""Steps between garbage collections; every tenth collection is a full one."""


@contextmanager
def collecting_between_steps() -> Iterator[Callable[[int], None]]:
    """Disable automatic garbage collection; yields a function to call after each step with its number.

    All ranks collect at the same steps, so that none waits for another's collection within a step.
    """

    def after(step: int) -> None:
        if step % COLLECT_EVERY == 0:
            gc.collect(2 if step % (10 * COLLECT_EVERY) == 0 else 1)

    enabled = gc.isenabled()
    gc.disable()
    try:
        yield after
    finally:
        if enabled:
            gc.enable()


WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable that deterministic cuBLAS needs."""


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Use torch's deterministic algorithms inside the context if `enabled`.

    On CUDA this covers cuDNN, cuBLAS, attention and torch's own kernels. An operation without a deterministic
    algorithm raises RuntimeError; in warn-only mode attention would use its nondeterministic backward pass. Enter the
    context before the first operation on a GPU, when cuBLAS reads the environment.
    """
    if not enabled:
        yield
        return
    cudnn: Any = torch.backends.cudnn
    filling: Any = torch.utils.deterministic
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(WORKSPACE)
    before = cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory
    os.environ[WORKSPACE] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    filling.fill_uninitialized_memory = False  # no kernel reads uninitialized memory
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory = before
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        if workspace is None:
            del os.environ[WORKSPACE]
        else:
            os.environ[WORKSPACE] = workspace
