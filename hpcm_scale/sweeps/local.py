"""A sweep's runs side by side on the devices of this machine."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
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

from hpcm_scale.devices import cpu_is_asked_for, device_count
from hpcm_scale.errors import UserError
from hpcm_scale.sweeps.jobs import Job, ended, group_members, plan_of, started, starting
from hpcm_scale.sweeps.state import Follower, RunState
from hpcm_scale.sweeps.table import at_end, console, sentence, table

# Which devices there are, and how the jobs of a sweep share them.


PORTS = range(20000, 30000)
"""Where processes of a job meet: below the ports that systems hand out by themselves."""


@dataclass(frozen=True)
class Share:
    """What one job at a time runs on."""

    processes: int
    gpus: tuple[int, ...]
    """Empty: the CPU."""

    def arguments(self) -> list[str]:
        """What tells `deepspeed` so."""
        if self.gpus:
            return ["--include", f"localhost:{','.join(map(str, self.gpus))}"]
        return ["--num_gpus", str(self.processes)]

    def __str__(self) -> str:
        if self.gpus:
            return f"GPU {', '.join(map(str, self.gpus))}"
        return f"{self.processes} CPU process{'es' if self.processes > 1 else ''}"


def visible_gpus() -> list[int]:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves, by their numbers on the machine.

    None if DS_ACCELERATOR=cpu. Raises UserError for names in place of numbers, and as `device_kind` does.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or cpu_is_asked_for():
        return list(range(device_count()))
    try:
        return [number for number in map(int, filter(None, visible.split(","))) if number >= 0]
    except ValueError:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} names devices in a way that deepspeed does not take; use their numbers"
        ) from None


def shares(gpus: Sequence[int], per_job: int, at_once: int | None, cores: int) -> list[Share]:
    """Disjoint parts of the machine, as many as jobs run at a time.

    `gpus` may be empty: then each job has `per_job` processes on the CPU, and `at_once` tells how many jobs; unset,
    as many as `cores` give each process one. Raises UserError for more than the machine has.
    """
    if len(set(gpus)) < len(gpus):
        raise UserError(f"hydra.launcher.gpus={list(gpus)} names a GPU twice; name each once")
    if not gpus:
        return [Share(per_job, ())] * (at_once or max(1, cores // per_job))
    room = len(gpus) // per_job
    if per_job * (at_once or 1) > len(gpus):
        wanted = f"hydra.launcher.gpus_per_job={per_job}" + (f" × jobs_at_once={at_once}" if at_once else "")
        raise UserError(f"{wanted} is more than the {len(gpus)} GPUs there are; ask for fewer")
    starts = range(0, per_job * (at_once or room), per_job)
    return [Share(per_job, tuple(gpus[start : start + per_job])) for start in starts]


def free_port(taken: Collection[int]) -> int:
    """A port of this machine that nobody listens on, none of those in `taken`."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        if port in taken:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise UserError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free on this machine; end what takes them")


# The processes of one job: one `deepspeed` in a session of its own, which ends as a whole.


_LAUNCHER = "deepspeed.launcher."
"""In the command line of DeepSpeed's own two processes of a job."""


class JobProcess:
    """Starts `command`; what its processes say is appended to `log`.

    Asked to end, they have `grace` seconds before they are killed. Raises BlockingIOError where processes that
    another call started write this log still.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str], grace: float) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("ab", buffering=0)
        self._lock()
        self._log.write(starting(command).encode(errors="surrogateescape"))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C is for us, who ask it to stop in good order
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
        if group_members(self._process.pid):  # deepspeed itself was ended from outside: so is what it started
            if self._asked is None:  # asked again, training ends without a checkpoint
                self._ask()
            return None
        if not self._log.closed:
            self._log.write(ended(code, asked=self._stopping).encode())
            self._log.close()
        return code

    def stop(self) -> None:
        """Ask the training processes to leave a checkpoint and end."""
        self._stopping = True
        self._ask()

    def kill(self) -> None:
        """End all of the job's processes at once."""
        self._stopping = True
        self._kill()

    def _lock(self) -> None:
        """The lock on the log is this job's as long as any of its processes lives: they all inherit it."""
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._log.close()
            raise
        except OSError:
            pass  # a file system without locks

    def _ask(self) -> None:
        """SIGTERM to the training processes; DeepSpeed's own two then end with them.

        Sent to DeepSpeed's launcher, it would have it kill after 30 s what still writes a checkpoint.
        """
        self._asked = self._asked or time.monotonic()
        members = group_members(self._process.pid)
        training = [process for process in members if not _is_launcher(process)]
        for process in training or members:
            with suppress(psutil.Error):
                process.terminate()

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _is_launcher(process: psutil.Process) -> bool:
    try:
        return any(argument.startswith(_LAUNCHER) for argument in process.cmdline())
    except psutil.Error:
        return False


# Trains the jobs of a sweep, several at a time on disjoint devices, each by a `deepspeed` of its own.


POLL_SECONDS = 0.2
DRAW_SECONDS = 1.0
ONCE_SECONDS = 1.0
"""Signals so close together are one: a terminal that closes sends several."""


@dataclass
class _Running:
    job: Job
    share: Share
    port: int
    process: JobProcess
    extensions: str
    """Where torch builds what this job needs: a build cut short would block others in a common place."""


class AtOnce:
    """One call of a sweep: `train` starts a job wherever a share of the machine is free, until all have ended."""

    def __init__(self, jobs: Sequence[Job], shares: Sequence[Share], cores: int, grace: float) -> None:
        self._waiting = list(jobs)
        self._free = list(shares)
        self._threads = max(1, cores // sum(share.processes for share in shares))
        self._grace = grace
        self._running: dict[Path, _Running] = {}
        self._followers = {job.folder: Follower(job.folder, plan_of(job)) for job in jobs}
        self._signals: list[tuple[int, float]] = []
        self._obeyed = 0

    def train(self) -> int | None:
        """Train all; returns the number of the signal that ended it at once, None if there was none."""
        on_terminal = sys.stderr.isatty()
        screen = Live(console=console(stderr=True), auto_refresh=False, transient=True)
        drawn = 0.0
        with self._listening(), screen if on_terminal else nullcontext():
            while self._running or (self._waiting and not self._signals):
                while self._waiting and self._free and not self._signals:
                    self._start(self._waiting.pop(0))
                self._obey()
                self._collect()
                if on_terminal and time.monotonic() > drawn + DRAW_SECONDS:
                    screen.update(table(self._states(), self._stopping()), refresh=True)
                    drawn = time.monotonic()
                time.sleep(POLL_SECONDS)
        return self._signals[1][0] if self._obeyed > 1 else None

    def _start(self, job: Job) -> None:
        share = self._free[0]
        port = free_port([running.port for running in self._running.values()])
        extensions = tempfile.mkdtemp(prefix="hpcm_torch_extensions_")
        environment = os.environ | {"TORCH_EXTENSIONS_DIR": extensions}
        if share.gpus:
            environment.pop("CUDA_VISIBLE_DEVICES", None)  # deepspeed counts all GPUs of the machine
        else:
            environment = {"OMP_NUM_THREADS": str(self._threads), "DS_ACCELERATOR": "cpu"} | environment
        # No regular file: a list of other machines that may lie in its usual place is not for these jobs.
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--hostfile", os.devnull]
        where = [*share.arguments(), "--master_port", str(port), "--module", "hpcm_scale.train"]
        try:
            process = JobProcess([*launcher, *where, *job.overrides], job.log, environment, self._grace)
        except BlockingIOError:
            shutil.rmtree(extensions)
            _tell(f"{job.folder} is being trained by processes of another call, and left to them: {job.log}")
            return
        self._free.remove(share)
        self._running[job.folder] = _Running(job, share, port, process, extensions)
        _tell(f"{job.folder}: started on {share}; log: {job.log}")

    def _collect(self) -> None:
        """Take leave of the jobs that have ended."""
        for folder, running in list(self._running.items()):
            if running.process.poll() is not None:
                del self._running[folder]
                self._free.append(running.share)
                shutil.rmtree(running.extensions, ignore_errors=True)
                _tell(sentence(running.job, at_end(running.job, self._followers[folder].look())))

    def _obey(self) -> None:
        """Asked to stop, end the jobs in good order; asked again, at once."""
        if len(self._signals) == self._obeyed:
            return
        self._obeyed = len(self._signals)
        for running in self._running.values():
            if self._obeyed == 1:
                running.process.stop()
            else:
                running.process.kill()
        _tell(self._stopping())

    def _stopping(self) -> str:
        if not self._signals:
            return ""
        return "stopping: " + ("the runs leave a checkpoint; Ctrl-C again: at once" if self._obeyed == 1 else "at once")

    def _states(self) -> list[RunState]:
        """How far the jobs are, by their files and by what only the one who starts their processes knows."""
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
        """Note Ctrl-C, SIGTERM and the end of the terminal, but for what is ignored (nohup)."""

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
    """A line where no terminal shows the table."""
    if not sys.stderr.isatty():
        print(text, flush=True)
