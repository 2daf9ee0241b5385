"""A long run with a fault every few minutes, which must not leak memory, files or processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from statistics import median
from typing import Any

import psutil

from fault_campaign.injections import ENDING, SURVIVED, Fault, Scene
from fault_campaign.runs import Run, key, wait_for
from hpcm_scale.errors import STOPPED

START_SECONDS = 300.0
LARGEST_GROWTH = 0.05
"""Largest relative growth of resident memory."""
SPARE_FILES = 2
"""Allowed difference of open descriptors, for a checkpoint being written or a shard being read."""
RECOVERY_SECONDS = 120.0
"""Longest time to the next step after a fault that the run survives."""


@dataclass(frozen=True)
class Sample:
    """Resources of the run's processes at one time."""

    seconds: float
    """Since the start of the soak."""
    start: int
    """Number of starts of the command so far."""
    ranks: tuple[float, ...]
    """Resident memory of the training processes, MiB."""
    tree: float
    """Resident memory of all processes of the run, MiB; shared pages count repeatedly."""
    files: int
    """Open file descriptors of the training processes."""
    processes: int


@dataclass
class Injected:
    """One fault and its outcome."""

    seconds: float
    fault: str
    step: int
    survived: bool = False
    seconds_to_end: float | None = None
    """Until no process remained, for faults that end the run."""
    seconds_to_step: float | None = None
    """Until the next step, from the start of the command or the end of the fault."""
    exit_code: int | None = None
    failure: str = ""


@dataclass
class Window:
    """Medians of samples around one time."""

    seconds: float
    ranks: list[float]
    total: float
    """Of the training processes, MiB."""
    tree: float
    files: float
    processes: float


@dataclass
class Soak:
    """Trains one run for `seconds` and injects a fault every `interval` seconds; all times in seconds.

    The first and the last faults end the run, which is then started again; it survives the others, so that one start
    covers most of the time.
    """

    scene: Scene
    seconds: float
    interval: float
    sample_every: float = 5.0
    restarts_first: int = 3
    restarts_last: int = 4
    advance: Callable[[], Any] = lambda: None
    samples: list[Sample] = field(default_factory=list)
    injected: list[Injected] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Failures found at the end."""
    starts: int = 0
    steps: int = 0
    """Last step."""

    def __post_init__(self) -> None:
        self._began = 0.0
        self._trains = threading.Event()
        self._over = threading.Event()

    def plan(self) -> list[Fault]:
        """The faults in order; after the last one, an interval without faults measures the last start."""
        count = max(1, int(self.seconds / self.interval) - 1)
        kinds = [fault for fault in SURVIVED if self.scene.disk or not fault.needs_disk]
        ending, lived = iter(cycle(ENDING)), iter(cycle(kinds))
        last = count - self.restarts_last
        return [
            next(ending) if number < self.restarts_first or number >= last else next(lived) for number in range(count)
        ]

    def go(self) -> None:
        """Run the soak; afterwards all processes have ended."""
        sampler = threading.Thread(target=self._sample, daemon=True)
        try:
            self._began = time.monotonic()
            self._start(None)
            sampler.start()
            for number, fault in enumerate(self.plan(), 1):
                self._sleep_until(number * self.interval)
                self._inject(fault)
                self.advance()
            self._sleep_until(self.seconds)
            self._stop()
        finally:
            self._over.set()
            self.scene.run.end()
        sampler.join()
        self._check_journal()

    @property
    def now(self) -> float:
        """Seconds since the start of the soak."""
        return time.monotonic() - self._began

    def window(self, seconds: float, start: int | None = None) -> Window | None:
        """Medians of the last dozen samples before `seconds`, or of those of one start."""
        found = [sample for sample in self.samples if sample.seconds <= seconds and start in (None, sample.start)][-12:]
        if not found:
            return None
        ranks = [median(values) for values in zip(*(sample.ranks for sample in found), strict=True)]
        total = median(sum(sample.ranks) for sample in found)
        others = (median(getattr(sample, name) for sample in found) for name in ("tree", "files", "processes"))
        return Window(seconds, ranks, total, *others)

    def longest_start(self) -> tuple[int, float, float]:
        """The longest start, and the times of its first and last sample."""
        spans: dict[int, list[float]] = {}
        for sample in self.samples:
            spans.setdefault(sample.start, []).append(sample.seconds)
        number = max(spans, key=lambda start: spans[start][-1] - spans[start][0])
        return number, spans[number][0], spans[number][-1]

    def _inject(self, fault: Fault) -> None:
        run = self.scene.run
        injected = Injected(self.now, fault.name, run.step())
        self.injected.append(injected)
        try:
            if run.poll() is not None:  # it did not survive the previous fault
                self._start(None)
            if fault.ends:
                self._trains.clear()
            fault.inject(self.scene)
            (self._restart if fault.ends else self._survive)(fault, injected)
        except TimeoutError as error:
            injected.failure = str(error)
        injected.survived = not injected.failure

    def _survive(self, fault: Fault, injected: Injected) -> None:
        run, began = self.scene.run, time.monotonic()
        step = run.step()
        wait_for(lambda: run.step() > step or run.poll() is not None, RECOVERY_SECONDS, "a step")
        injected.seconds_to_step = time.monotonic() - began
        if run.poll() is not None:
            injected.exit_code = run.poll()
            injected.failure = f"it ended: {run.output()[-1000:]}"

    def _restart(self, fault: Fault, injected: Injected) -> None:
        run, began = self.scene.run, time.monotonic()
        wait_for(lambda: run.poll() is not None, 60.0, "the end")
        run.wait_until_gone()
        injected.seconds_to_end = time.monotonic() - began
        injected.exit_code = run.poll()
        if fault.code is not None and run.poll() != fault.code:
            injected.failure = f"exit code {run.poll()} instead of {fault.code}: {run.output()[-1000:]}"
        newest = run.newest()
        self._start(injected)
        if fault.damages and f"step_{newest:08d}" not in run.output():
            injected.failure = f"the damaged checkpoint of step {newest} is not reported: {run.output()[:1000]}"

    def _start(self, injected: Injected | None) -> None:
        run = self.scene.run
        self._trains.clear()
        self.starts += 1
        run.start()
        wait_for(lambda: self._has_stepped(run) or run.poll() is not None, START_SECONDS, "a step")
        if run.poll() is not None:
            raise TimeoutError(f"after the restart it exited with code {run.poll()}: {run.output()[-1000:]}")
        if injected:
            injected.seconds_to_step = time.time() - run.started
        self._trains.set()

    @staticmethod
    def _has_stepped(run: Run) -> bool:
        """Whether the journal has grown since it was resumed at the newest complete checkpoint."""
        newest = run.newest()
        return run.new_steps(newest) > 0

    def _stop(self) -> None:
        run = self.scene.run
        self._trains.clear()
        if run.poll() is None:
            (run.folder / "stop").touch()
            wait_for(lambda: run.poll() is not None, 60.0, "the end")
        try:
            run.wait_until_gone()
        except TimeoutError as error:
            self.failures.append(str(error))
        if run.poll() != STOPPED:
            self.failures.append(f"after the stop it exited with code {run.poll()}: {run.output()[-1000:]}")

    def _check_journal(self) -> None:
        keys = [key(record) for record in self.scene.run.records()]
        steps = [step for step, kind in keys if kind == "train"]
        self.steps = steps[-1]
        if steps != list(range(1, self.steps + 1)):
            self.failures.append("the journal has missing or repeated steps")
        if len(set(keys)) < len(keys):
            self.failures.append("the journal has repeated evaluations")

    def _sleep_until(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds - self.now))

    def _sample(self) -> None:
        while not self._over.wait(self.sample_every):
            if self._trains.is_set():
                with suppress(psutil.Error, OSError):
                    self._look()

    def _look(self) -> None:
        run = self.scene.run
        ranks = run.ranks()
        resident = tuple(_megabytes(rank) for rank in ranks)
        members = run.members()
        sample = Sample(
            self.now,
            self.starts,
            resident,
            sum(map(_megabytes, members)),
            sum(rank.num_fds() for rank in ranks),
            len(members),
        )
        if self._trains.is_set() and len(ranks) == run.processes:
            self.samples.append(sample)


def _megabytes(process: psutil.Process) -> float:
    return process.memory_info().rss / 2**20


def growth(before: Window | None, after: Window | None) -> float | None:
    """Relative growth of the training processes' memory."""
    return None if before is None or after is None else after.total / before.total - 1


def flat(windows: Sequence[Window | None]) -> bool:
    """Whether memory, descriptors and processes have not grown since the first window."""
    if None in windows:
        return False
    first, *others = windows
    return all(
        growth(first, other) <= LARGEST_GROWTH
        and other.files <= first.files + SPARE_FILES
        and other.processes <= first.processes
        for other in others
    )
