"""A run folder, the command that trains it, and its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from fork_server import ForkServer
from safetensors.torch import load_file

from hpcm_scale.sweeps.local import free_port

LONGEST_AFTERLIFE = 300.0
"""Seconds after which the remaining processes of an ended run count as hanging."""
POLL_SECONDS = 0.002
_LAUNCH = "deepspeed.launcher.launch"
_LONGEST_LINE = 8192
"""Longest journal line, bytes."""
_MARK = "FAULT_CAMPAIGN_RUN"


class Run:
    """A run folder and the command that trains it, which can be started repeatedly.

    Its processes are found by the session of each `start`, and by the folder in their command line or environment.
    With `forks`, processes are forked from that server, without DeepSpeed's launcher.
    """

    def __init__(self, folder: Path, overrides: Sequence[str], processes: int = 2, log: Path | None = None) -> None:
        self.folder = folder.absolute()
        self.log = log or self.folder.with_name(f"{self.folder.name}.log")
        self.journal = self.folder / "metrics.jsonl"
        self.weights = self.folder / "weights.safetensors"
        self.checkpoints = self.folder / "checkpoints"
        self.overrides = [*overrides, f"run.dir={self.folder}"]
        self.processes = processes
        self.port = free_port([])
        self.started = 0.0
        """Time of the last start, seconds since the epoch."""
        self._process: Any = None
        self._sessions: list[int] = []
        self._log_start = 0

    def start(self, forks: ForkServer | None = None) -> None:
        """Start the command."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {_MARK: str(self.folder)}
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self.started = time.time()
        where = {"cwd": self.folder.parent, "env": environment}
        with self.log.open("ab") as log:
            if forks:
                where |= {"processes": self.processes, "output": log}
                self._process = forks.start("hpcm_scale.train", self.overrides, **where)
            else:
                streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
                command = [*self._launcher(), *self.overrides]
                self._process = subprocess.Popen(command, **where, **streams, start_new_session=True)
        self._sessions.append(self._process.pid)

    def _launcher(self) -> list[str]:
        train = ["-m", "hpcm_scale.train"]
        if self.processes == 1:
            return [sys.executable, "-u", *train]
        runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--hostfile", os.devnull]
        return [*runner, "--num_gpus", str(self.processes), "--master_port", str(self.port), "--module", train[1]]

    @property
    def forked(self) -> bool:
        """Whether the processes of the last start were forked."""
        return not isinstance(self._process, subprocess.Popen)

    def poll(self) -> int | None:
        """The exit code of the command, None while it runs."""
        return self._process.poll()

    def output(self) -> str:
        """Output of the command since its last start."""
        return self.log.read_bytes()[self._log_start :].decode(errors="replace")

    def finish(self, forks: ForkServer | None = None, limit: float = 600.0) -> int:
        """Start the command and wait until all its processes have ended; its exit code."""
        self.start(forks)
        wait_for(lambda: self.poll() is not None, limit, f"the end of {self.folder.name}")
        self.wait_until_gone()
        return self.poll()

    def members(self) -> list[psutil.Process]:
        """The running processes of all starts."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                return False
            if os.getsid(process.pid) in self._sessions:
                return True
            named = [process.environ().get(_MARK, ""), *process.cmdline()]
        except (OSError, psutil.Error):
            return False  # it has ended by now
        return str(self.folder) in named or f"run.dir={self.folder}" in named

    def launchers(self) -> list[psutil.Process]:
        """DeepSpeed's runner and its launch.py."""
        leader = psutil.Process(self._process.pid)
        return [leader, *(child for child in leader.children() if _LAUNCH in child.cmdline())]

    def ranks(self) -> list[psutil.Process]:
        """The running training processes of the last start, in order of rank; none during start-up."""
        with suppress(psutil.Error):
            if self.processes == 1:
                return [psutil.Process(self._process.pid)]
            leader, *below = self.launchers()
            children = sorted((below or [leader])[-1].children(), key=lambda child: child.pid)
            return [child for child in children if self._is_ours(child) and (below or self.forked)]
        return []

    def wait_until_gone(self, limit: float = LONGEST_AFTERLIFE) -> float:
        """Seconds until no process remains and the exit code is known, which may be later.

        Raises TimeoutError after `limit` seconds, and kills the remaining processes.
        """
        began = time.monotonic()
        while (left := self.members()) or self.poll() is None:
            if time.monotonic() > began + limit:
                names = "; ".join(" ".join(process.cmdline())[:200] for process in left if process.is_running())
                self.end()
                raise TimeoutError(f"{len(left)} processes of {self.folder.name} remain after {limit:.0f} s: {names}")
            time.sleep(0.05)
        return time.monotonic() - began

    def end(self) -> None:
        """Kill all remaining processes."""
        for process in self.members():
            with suppress(psutil.Error):
                process.kill()

    def records(self) -> list[dict[str, Any]]:
        """The complete lines of the journal."""
        try:
            lines = self.journal.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def last(self) -> dict[str, Any] | None:
        """The last complete line of the journal, or None."""
        try:
            with self.journal.open("rb") as journal:
                journal.seek(max(0, self.journal.stat().st_size - _LONGEST_LINE * 2))
                lines = journal.read().splitlines(keepends=True)
        except FileNotFoundError:
            return None
        whole = [line for line in lines if line.endswith(b"\n")]
        return json.loads(whole[-1]) if whole else None

    def step(self) -> int:
        """The last step in the journal."""
        last = self.last()
        return last["step"] if last else 0

    def complete(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return sorted(int(file.parent.name.removeprefix("step_")) for file in self.checkpoints.glob("*/complete.json"))

    def newest(self) -> int:
        """The step of the newest complete checkpoint, 0 without one."""
        return max(self.complete(), default=0)

    def new_steps(self, after: int) -> int:
        """Steps beyond `after` in the journal since the last start; −1 before the journal was resumed."""
        try:
            if self.journal.stat().st_mtime < self.started:
                return -1
        except FileNotFoundError:
            return -1
        return self.step() - after


@contextmanager
def ended_with(run: Run) -> Iterator[Run]:
    """Afterwards, kill all processes of the run."""
    try:
        yield run
    finally:
        run.end()


def wait_for(condition: Callable[[], bool], limit: float, what: str, pause: float = 0.02) -> float:
    """Seconds until `condition()`. Raises TimeoutError after `limit`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() > began + limit:
            raise TimeoutError(f"timed out after {limit:.0f} s waiting for {what}")
        time.sleep(pause)
    return time.monotonic() - began


def numbers(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Journal records without the values that depend on time."""
    return [
        {key: value for key, value in record.items() if key != "time" and not key.startswith("perf/")}
        for record in records
    ]


def key(record: dict[str, Any]) -> tuple[int, str]:
    """Identifies a journal line: its step, and "train" or "eval"."""
    return record["step"], "eval" if "eval/loss" in record else "train"


def same_weights(one: Path, other: Path) -> bool:
    """Whether two exported models are bit-identical."""
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def kill(processes: Sequence[psutil.Process]) -> None:
    """Send SIGKILL to all of them."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
