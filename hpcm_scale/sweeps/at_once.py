"""Trains the jobs of a sweep, several at a time on disjoint devices, each by a `deepspeed` of its own."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from rich.live import Live

from hpcm_scale.sweeps.devices import Share, free_port
from hpcm_scale.sweeps.job_process import JobProcess
from hpcm_scale.sweeps.jobs import Job
from hpcm_scale.sweeps.plan import plan_of
from hpcm_scale.sweeps.state import Follower, RunState
from hpcm_scale.sweeps.summary import at_end, sentence
from hpcm_scale.sweeps.table import console, table

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
