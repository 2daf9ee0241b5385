"""Worker processes that ignore stop signals and exit with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import psutil

from hpcm_scale.errors import UserError

Result = TypeVar("Result")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Sent by terminals, launchers and Slurm to a whole process tree; the parent decides whether to stop."""


def available_cores() -> int:
    """Number of cores this process may use."""
    return len(cores())


def cores() -> set[int]:
    """Numbers of the cores this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def follow_parent(stop: Connection | None = None) -> None:
    """Make this worker ignore `STOP_SIGNALS` and exit when its parent exits or `stop` becomes readable."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None
    awaited = [parent.sentinel, *([] if stop is None else [stop])]
    threading.Thread(target=_exit_after, args=(awaited,), daemon=True).start()


def _exit_after(awaited: list) -> None:
    wait(awaited)
    for started in psutil.Process().children(recursive=True):  # such as the command of a pipe
        started.kill()
    os._exit(0)


@contextmanager
def block_stop_signals() -> Iterator[None]:
    """Block stop signals while workers start: in them until `follow_parent`, here until the end of the context."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def parallel(jobs: Iterable[Callable[[], Result]], workers: int) -> Generator[Result, None, None]:
    """The results of calling `jobs` in processes, in order, with at most 4 · workers of them waiting.

    Raises `UserError` if a worker dies.
    """
    if workers == 1:
        for job in jobs:
            yield job()
        return
    pool = ProcessPoolExecutor(workers, initializer=follow_parent)
    try:
        waiting = deque()
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "worker-killed",
            "--workers",
            "a worker process died, probably because memory ran out; run the command again with fewer --workers",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
