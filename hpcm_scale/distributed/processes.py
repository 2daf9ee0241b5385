"""The processes of a run: environment variables of their launchers, and the identity and end of each of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import psutil
import torch

from hpcm_scale.data.processes import available_cores
from hpcm_scale.devices import device_count, local_device

_LAUNCHERS = ("deepspeed.launcher.", "torch.distributed.run", "torch.distributed.launch", "accelerate.commands.")
_LAUNCHER_SCRIPTS = ("deepspeed", "torchrun", "accelerate", "accelerate-launch")
_CLOCK_TOLERANCE = 5.0
"""Seconds that two readings of one process's start time may differ: the node's clock may be set in between."""


def world_size() -> int:
    """Number of ranks of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size(default: int | None = None) -> int:
    """Number of ranks on this node; DeepSpeed and torchrun set variables of different names.

    Without either, `default`, or the world size.
    """
    return int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", default or world_size())))


def without_launcher_arguments(arguments: Sequence[str]) -> list[str]:
    """The user's arguments, without the --local_rank=N that DeepSpeed's launcher adds."""
    return [argument for argument in arguments if not argument.startswith("--local_rank")]


def complete_environment() -> None:
    """Set the variables of a launcher for a single process that was started without one."""
    if "RANK" not in os.environ:
        defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(defaults, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))


def gpu_index() -> int | None:
    """Index of this rank's GPU, None on the CPU. Raises UserError if there are fewer GPUs than local ranks."""
    count = device_count()
    if count == 0:
        return None
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return local_device(local_rank, local_world_size(default=1), count, os.environ.get("CUDA_VISIBLE_DEVICES"))


def choose_device() -> None:
    """On the CPU set DeepSpeed's accelerator and the number of threads. Raises UserError as `gpu_index` does."""
    if gpu_index() is not None:
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // local_world_size()))  # ranks of a node share its cores


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Ranks, and the launchers above them.


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
        return _has_ended(self.pid, self.started)


def _has_ended(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        reused = abs(process.create_time() - started) > _CLOCK_TOLERANCE
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
        above = [*takewhile(_is_launcher, psutil.Process().parents())]
        self._processes = [(process.pid, process.create_time()) for process in above]
        by_deepspeed = "CROSS_RANK" in os.environ  # only its launch.py sets it
        self._gone = by_deepspeed and (not above or _is_orphaned(above[-1]))

    def is_gone(self) -> bool:
        """Whether one of the launchers has ended before this process."""
        self._gone = self._gone or any(_has_ended(*process) for process in self._processes)
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
