"""Worker processes that leave decisions to their parent and do not outlive it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import psutil

from hpcm_scale.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What terminals, launchers and Slurm send to a whole process tree; whether to stop is for the parent to decide."""


def available_cores() -> int:
    """Cores this process may use."""
    return len(cores())


def cores() -> set[int]:
    """Their numbers; processes of one machine may share them."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def follow(stop: Connection | None = None) -> None:
    """Make this worker ignore `STOP_SIGNALS`, and end with its parent or when `stop` can be read."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    awaited = [multiprocessing.parent_process().sentinel, *([] if stop is None else [stop])]
    threading.Thread(target=_end_after, args=(awaited,), daemon=True).start()


def _end_after(awaited: list) -> None:
    wait(awaited)
    for started in psutil.Process().children(recursive=True):  # the command of a pipe
        started.kill()
    os._exit(0)


@contextmanager
def sheltered() -> Iterator[None]:
    """Start workers in here: no signal reaches them before they `follow`, and none is lost for this process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def parallel_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map` over processes: results in order, and few of them waiting at any time.

    Raises `UserError` if a worker dies.
    """
    if workers == 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, initializer=follow)
    try:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, most likely for want of memory; call again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
