"""What must be the same on all processes of a run, and where it is not."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import psutil

from hpcm_scale import __version__
from hpcm_scale.config.compose import to_dict
from hpcm_scale.config.schema import Config

# The processes of a run as they know each other, and the launcher that started them.


_LAUNCHERS = ("deepspeed.launcher.", "torch.distributed.run", "torch.distributed.launch", "accelerate.commands.")
_LAUNCHER_SCRIPTS = ("deepspeed", "torchrun", "accelerate", "accelerate-launch")
_SAME_SECONDS = 5.0
"""Two processes that read the start time of a third may be so far apart: the clock of the machine is set meanwhile."""


class Peer(NamedTuple):
    """One process of a run."""

    rank: int
    host: str
    pid: int
    started: float
    """When, in seconds since 1970: a number may be given to another process later."""

    @classmethod
    def this(cls, rank: int) -> Peer:
        """The process that asks."""
        process = psutil.Process()
        return cls(rank, socket.gethostname(), process.pid, process.create_time())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Peer:
        """What `_asdict` gave."""
        return cls(**{name: values[name] for name in cls._fields})

    def __str__(self) -> str:
        return f"process {self.rank} (pid {self.pid} on {self.host})"

    def is_visible(self) -> bool:
        """Whether this machine (and container) runs it, so that its end can be seen."""
        return self.host == socket.gethostname() and not self.has_ended()

    def has_ended(self) -> bool:
        """Whether there is no such process on this machine any more."""
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.started) > _SAME_SECONDS:
                return True
            return process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


class Launcher:
    """The programs that started this process to train: `deepspeed` and the launch.py below it, torchrun, accelerate.

    A shell, nohup or Slurm are none: training outlives them, or is told by them to stop.
    """

    def __init__(self) -> None:
        self._processes: list[psutil.Process] = []
        above = None
        for above in psutil.Process().parents():
            if not _is_launcher(above):
                break
            self._processes.append(above)
        by_deepspeed = "CROSS_RANK" in os.environ  # only its launch.py sets it
        top = self._processes[-1] if self._processes else None
        self._gone = by_deepspeed and (top is None or _was_orphaned(top))

    def is_gone(self) -> bool:
        """Whether one of them has ended, before this process did."""
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


def _was_orphaned(launcher: psutil.Process) -> bool:
    """Whether launch.py, which `deepspeed` or a shell at the end of ssh starts, has lost its parent already."""
    try:
        return launcher.ppid() == 1 and "deepspeed.launcher.launch" in launcher.cmdline()
    except psutil.Error:
        return True


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def numbers(ranks: Sequence[int]) -> str:
    """For example `process 1` or `processes 2-7, 9`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][-1] == rank - 1:
            spans[-1][1:] = [rank]
        else:
            spans.append([rank])
    text = ", ".join("-".join(map(str, span)) for span in spans)
    return f"process{'es' if len(ranks) > 1 else ''} {text}"


Facts = Mapping[str, Mapping[str, Any]]
"""Plain JSON values by name, by kind."""

_MENDS = {
    "version": "install the same versions on all machines",
    "launch": "start all machines with the same hostfile and numbers",
    "setting": "type the same command on all machines",
    "photos": "give all machines the same shards",
    "run folder": "put run.dir on a file system that all machines share",
}


def facts(config: Config, data_digest: str) -> dict[str, dict[str, Any]]:
    """What a run's processes compare before they train; nothing of it may differ between machines."""
    packages = {name: version(name) for name in ("torch", "deepspeed", "accelerate")}
    return {
        "version": {"Python": platform.python_version(), "hpcm_scale": __version__} | packages,
        "launch": {"WORLD_SIZE": os.environ.get("WORLD_SIZE", "1")},
        "setting": to_dict(config),
        "photos": {"digest": data_digest},
    }


def difference(peers: Sequence[Peer], all_facts: Sequence[Facts]) -> str | None:
    """The first difference to the first process's facts, in one sentence with its mend; None if there is none.

    Other kinds than those of `facts` may be compared, too: {"run folder": {"step": 40}}.
    """
    first = all_facts[0]
    for peer, other in zip(peers[1:], all_facts[1:], strict=True):
        for kind in first:
            found = _differing(first[kind], other.get(kind))
            if found:
                name, here, there = found
                return f"{peer} has {name}={there}, and {peers[0]} has {here}; {_MENDS[kind]}"
    return None


def _differing(one: Any, other: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Dotted name and both values of the first entry that differs."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return None if one == other else (name, one, other)
    for key in dict.fromkeys([*one, *other]):
        found = _differing(one.get(key), other.get(key), f"{name}.{key}" if name else key)
        if found:
            return found
    return None
