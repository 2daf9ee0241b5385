"""Concurrent runs of a sweep on disjoint devices of this node."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import psutil
from rich.live import Live

from hpcm_scale.config.sweeps import DeepSpeedOptions
from hpcm_scale.data.processes import available_cores
from hpcm_scale.devices import cpu_is_requested, device_count
from hpcm_scale.errors import UserError
from hpcm_scale.sweeps.jobs import (
    Job,
    arguments_of,
    ended,
    group_members,
    started,
    starting,
    unfinished,
    write_plans,
)
from hpcm_scale.sweeps.status import Follower, RunState, at_end, console, sentence, summary, table

# Devices and their division among concurrent jobs.


PORTS = range(20000, 30000)
"""Rendezvous ports, below the ephemeral ports of the system."""


@dataclass(frozen=True)
class Share:
    """Devices of one job at a time."""

    processes: int
    gpus: tuple[int, ...]
    """Indices; empty for the CPU."""

    def arguments(self) -> list[str]:
        """Arguments of `deepspeed`."""
        if self.gpus:
            return ["--include", f"localhost:{','.join(map(str, self.gpus))}"]
        return ["--num_gpus", str(self.processes)]

    def __str__(self) -> str:
        if self.gpus:
            return f"GPU {', '.join(map(str, self.gpus))}"
        return f"{self.processes} CPU process{'es' if self.processes > 1 else ''}"


def visible_gpus() -> list[int]:
    """Indices of the GPUs in CUDA_VISIBLE_DEVICES, or of all; empty if DS_ACCELERATOR=cpu.

    Raises UserError for names instead of indices, and as `devices.device_count` does.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or cpu_is_requested():
        return list(range(device_count()))
    try:
        return [number for number in map(int, filter(None, visible.split(","))) if number >= 0]
    except ValueError:
        raise UserError(
            "device-names",
            "CUDA_VISIBLE_DEVICES",
            f"DeepSpeed does not accept the device names in CUDA_VISIBLE_DEVICES={visible}; use indices",
        ) from None


def shares(gpus: Sequence[int], per_job: int, at_once: int | None, cores: int) -> list[Share]:
    """Disjoint parts of the node, one per concurrent job.

    Args:
        gpus: indices; empty for the CPU.
        per_job: GPUs, or processes on the CPU, of each job.
        at_once: concurrent jobs; None for as many as fit on the GPUs, or as `cores` allow with one per process.
        cores: processor cores.

    Raises:
        UserError: a GPU is listed twice, or there are too few.
    """
    if len(set(gpus)) < len(gpus):
        raise UserError(
            "duplicate-gpu", "hydra.launcher.gpus", f"hydra.launcher.gpus={list(gpus)} lists a GPU twice; list it once"
        )
    if not gpus:
        return [Share(per_job, ())] * (at_once or max(1, cores // per_job))
    room = len(gpus) // per_job
    if per_job * (at_once or 1) > len(gpus):
        wanted = f"hydra.launcher.gpus_per_job={per_job}" + (f" × jobs_at_once={at_once}" if at_once else "")
        raise UserError(
            "too-few-gpus",
            "hydra.launcher.gpus_per_job",
            f"{wanted} is more than the {len(gpus)} GPUs of this node; lower it",
        )
    starts = range(0, per_job * (at_once or room), per_job)
    return [Share(per_job, tuple(gpus[start : start + per_job])) for start in starts]


def free_port(taken: Collection[int]) -> int:
    """A free port of this node that is not in `taken`. Raises UserError if there is none."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        if port in taken:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise UserError(
        "no-free-port",
        "",
        f"no port from {PORTS.start} to {PORTS.stop - 1} is free on this node; stop the processes that use them",
    )


# The processes of one job: `deepspeed` in its own session.


_LAUNCHER = "deepspeed.launcher."
"""Part of the command line of DeepSpeed's own two processes of a job."""


class JobProcess:
    """Starts `command` with its output appended to `log`.

    After `stop`, its processes have `grace` seconds before they are killed. Raises BlockingIOError if processes of
    another command still write this log.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str], grace: float) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("ab", buffering=0)
        try:  # all processes of the job inherit the lock
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._log.close()
            raise
        except OSError:
            pass  # a file system without locks
        self._log.write(starting(command).encode(errors="surrogateescape"))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process only, which stops the job
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
        if group_members(self._process.pid):  # deepspeed was killed from outside: its processes are stopped, too
            if self._asked is None:  # a second signal would end training without a checkpoint
                self._ask()
            return None
        if not self._log.closed:
            self._log.write(ended(code, asked=self._stopping).encode())
            self._log.close()
        return code

    def stop(self) -> None:
        """Stop the training processes, which write a checkpoint."""
        self._stopping = True
        self._ask()

    def kill(self) -> None:
        """Kill all processes of the job."""
        self._stopping = True
        self._kill()

    def _ask(self) -> None:
        """Send SIGTERM to the training processes; DeepSpeed's own two end with them.

        On SIGTERM, DeepSpeed's launcher would kill processes that still write a checkpoint after 30 s.
        """
        self._asked = self._asked or time.monotonic()
        members = group_members(self._process.pid)
        training = [each for each in members if not any(word.startswith(_LAUNCHER) for word in arguments_of(each))]
        for process in training or members:
            with suppress(psutil.Error):
                process.terminate()

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


# Concurrent jobs on disjoint devices, each started by `deepspeed`.


POLL_SECONDS = 0.2
DRAW_SECONDS = 1.0
ONCE_SECONDS = 1.0
"""Signals within this time count as one: a terminal that closes sends several."""


@dataclass
class _Running:
    job: Job
    share: Share
    port: int
    process: JobProcess


class AtOnce:
    """Trains jobs on shares of the node; a job starts as soon as a share is free.

    With `fail_fast`, a failed job stops the others as a signal does.
    """

    def __init__(
        self, jobs: Sequence[Job], shares: Sequence[Share], cores: int, grace: float, fail_fast: bool = False
    ) -> None:
        self._fail_fast = fail_fast
        self._waiting = list(jobs)
        self._free = list(shares)
        self._threads = max(1, cores // sum(share.processes for share in shares))
        self._grace = grace
        self._running: dict[Path, _Running] = {}
        self._followers = {job.folder: Follower(job.folder, job.plan) for job in jobs}
        self._signals: list[tuple[int, float]] = []
        self._handled = 0

    def train(self) -> int | None:
        """Train all jobs; returns the number of the second signal, which kills them, or None."""
        on_terminal = sys.stderr.isatty()
        screen = Live(console=console(stderr=True), auto_refresh=False, transient=True)
        drawn = 0.0
        built = tempfile.TemporaryDirectory(prefix="hpcm_torch_extensions_", ignore_cleanup_errors=True)
        with built as self._extensions, self._listening(), screen if on_terminal else nullcontext():
            while self._running or (self._waiting and not self._signals):
                while self._waiting and self._free and not self._signals:
                    self._start(self._waiting.pop(0))
                self._handle_signals()
                self._collect()
                if on_terminal and time.monotonic() > drawn + DRAW_SECONDS:
                    screen.update(table(self._states(), self._stopping()), refresh=True)
                    drawn = time.monotonic()
                time.sleep(POLL_SECONDS)
        return self._signals[1][0] if self._handled > 1 else None

    @property
    def stopped(self) -> bool:
        """Whether a signal, or a failure with `fail_fast`, has stopped it."""
        return bool(self._signals)

    def _start(self, job: Job) -> None:
        share = self._free[0]
        port = free_port([running.port for running in self._running.values()])
        # An interrupted build of an extension in a common folder would block other jobs.
        environment = os.environ | {"TORCH_EXTENSIONS_DIR": tempfile.mkdtemp(dir=self._extensions)}
        if share.gpus:
            environment.pop("CUDA_VISIBLE_DEVICES", None)  # deepspeed numbers all GPUs of the node
        else:
            environment = {"OMP_NUM_THREADS": str(self._threads), "DS_ACCELERATOR": "cpu"} | environment
        # No hostfile: one in its default place is not for these jobs.
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--hostfile", os.devnull]
        where = [*share.arguments(), "--master_port", str(port), "--module", "hpcm_scale.train"]
        try:
            process = JobProcess([*launcher, *where, *job.overrides], job.log, environment, self._grace)
        except BlockingIOError:
            _tell(f"{job.folder} is being trained by another command and is skipped here; log: {job.log}")
            return
        self._free.remove(share)
        self._running[job.folder] = _Running(job, share, port, process)
        _tell(f"{job.folder}: started on {share}; log: {job.log}")

    def _collect(self) -> None:
        """Report the jobs that have ended and free their shares."""
        for folder, running in list(self._running.items()):
            if running.process.poll() is not None:
                del self._running[folder]
                self._free.append(running.share)
                state = at_end(running.job, self._followers[folder].look())
                _tell(sentence(running.job, state))
                if self._fail_fast and state.state == "failed" and not self._signals:
                    self._signals.append((0, time.monotonic()))

    def _handle_signals(self) -> None:
        """Stop the jobs at the first signal and kill them at the second."""
        if len(self._signals) == self._handled:
            return
        self._handled = len(self._signals)
        for running in self._running.values():
            if self._handled == 1:
                running.process.stop()
            else:
                running.process.kill()
        _tell(self._stopping())

    def _stopping(self) -> str:
        if not self._signals:
            return ""
        return "killing the runs" if self._handled > 1 else "stopping: runs write a checkpoint; Ctrl-C again kills them"

    def _states(self) -> list[RunState]:
        """States of the jobs, from their files and from the processes started here."""
        waiting = {job.folder for job in self._waiting}
        states = []
        for folder, follower in self._followers.items():
            state = follower.look()
            if folder in self._running:
                state = replace(state, state="stopping" if self._signals else "running", note="")
            elif folder in waiting:
                state = replace(state, state="waiting", note="")
            states.append(state)
        return states

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Record SIGINT, SIGTERM and SIGHUP, except ignored ones (nohup)."""

        def note(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if not self._signals or now > self._signals[-1][1] + ONCE_SECONDS:
                self._signals.append((number, now))

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _tell(text: str) -> None:
    """Print a line unless a terminal shows the table."""
    if not sys.stderr.isatty():
        print(text, flush=True)


def train_at_once(jobs: Sequence[Job], options: DeepSpeedOptions) -> int:
    """Train the jobs on the devices of this node and print a table; returns the exit code.

    Raises SystemExit if a signal stops it, or a failed job with `options.fail_fast`; UserError, before the first job
    starts, for everything that a job would be refused for.
    """
    gpus, cores = visible_gpus() if options.gpus is None else options.gpus, available_cores()
    parts = shares(gpus, options.gpus_per_job, options.jobs_at_once, cores)
    left = unfinished(jobs, options.gpus_per_job)
    write_plans(jobs)
    training = AtOnce(left, parts[: max(1, len(left))], cores, options.grace, options.fail_fast)
    number = training.train()
    code = summary(jobs, left)
    if training.stopped:
        raise SystemExit(code if number is None else 128 + number)
    return code
