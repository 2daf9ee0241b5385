"""Identity of each rank, and the launcher that started it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

import psutil

_LAUNCHERS = ("deepspeed.launcher.", "torch.distributed.run", "torch.distributed.launch", "accelerate.commands.")
_LAUNCHER_SCRIPTS = ("deepspeed", "torchrun", "accelerate", "accelerate-launch")
_CLOCK_TOLERANCE = 5.0
"""Seconds that two readings of one process's start time may differ: the node's clock may be set in between."""


class RankInfo(NamedTuple):
    """Host and process of one rank."""

    rank: int
    host: str
    pid: int
    started: float
    """Start time in seconds since 1970, since a pid may be reused."""

    @classmethod
    def of_this_process(cls, rank: int) -> RankInfo:
        """The entry of the calling process."""
        process = psutil.Process()
        return cls(rank, socket.gethostname(), process.pid, process.create_time())

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    def is_local(self) -> bool:
        """Whether it runs on this node and in this container, so that its end is visible here."""
        return self.host == socket.gethostname() and not self.has_ended()

    def has_ended(self) -> bool:
        """Whether this node no longer runs the process."""
        try:
            process = psutil.Process(self.pid)
            reused = abs(process.create_time() - self.started) > _CLOCK_TOLERANCE
            return reused or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


class Launcher:
    """The launchers above this process: `deepspeed` and its launch.py, torchrun, accelerate.

    A shell, nohup and Slurm do not count: training outlives them, or they signal it to stop.
    """

    def __init__(self) -> None:
        self._processes: list[psutil.Process] = []
        for parent in psutil.Process().parents():
            if not _is_launcher(parent):
                break
            self._processes.append(parent)
        by_deepspeed = "CROSS_RANK" in os.environ  # only its launch.py sets it
        self._gone = by_deepspeed and (not self._processes or _is_orphaned(self._processes[-1]))

    def is_gone(self) -> bool:
        """Whether one of the launchers has ended before this process."""
        self._gone = self._gone or any(not _is_alive(process) for process in self._processes)
        return self._gone


def _is_launcher(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    names = [os.path.basename(argument) for argument in command[:2]]  # noqa: PTH119 (an argument, not a path)
    return any(name in _LAUNCHER_SCRIPTS for name in names) or any(
        argument.startswith(_LAUNCHERS) for argument in command[:4]
    )


def _is_orphaned(launcher: psutil.Process) -> bool:
    """Whether launch.py, which `deepspeed` or a remote shell starts, has already lost its parent."""
    try:
        return launcher.ppid() == 1 and "deepspeed.launcher.launch" in launcher.cmdline()
    except psutil.Error:
        return True


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def format_ranks(ranks: Sequence[int]) -> str:
    """Ranks as text, such as `rank 1` or `ranks 2-7, 9`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    text = ", ".join("-".join(map(str, span)) for span in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
