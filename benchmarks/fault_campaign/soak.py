"""A long run with a fault every few minutes: is memory flat, is every file closed, is no process left behind?"""

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

from fault_campaign.injections import ENDING, LIVED_THROUGH, Fault, Scene
from fault_campaign.runs import Run, key, wait_for
from hpcm_scale.errors import STOPPED

START_SECONDS = 300.0
LARGEST_GROWTH = 0.05
"""Of resident memory."""
SPARE_FILES = 2
"""Descriptors by which two moments of a run may differ: a checkpoint is being written, a shard read."""
MENDED_SECONDS = 120.0
"""Within so long after a fault that a run lives through, it must have taken a step and written its journal."""


@dataclass(frozen=True)
class Sample:
    """What the processes of the run held at one time."""

    seconds: float
    """Since the soak began."""
    start: int
    """How many times the command had been typed."""
    ranks: tuple[float, ...]
    """Resident memory of the training processes, MiB."""
    tree: float
    """That of all processes of the run, MiB; shared pages count in each."""
    files: int
    """Open file descriptors of the training processes."""
    processes: int


@dataclass
class Injected:
    """One fault, and what became of the run."""

    seconds: float
    fault: str
    step: int
    survived: bool = False
    seconds_to_end: float | None = None
    """Until no process was left, for faults that end the run."""
    seconds_to_step: float | None = None
    """Until the next step: from typing the command, or from the end of the fault."""
    exit_code: int | None = None
    failure: str = ""


@dataclass
class Window:
    """Medians of the samples around one time."""

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

    The first faults and the last ones end the run, which is then started again; those between it must live through,
    so that one start of it lives for most of the time.
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
    """What is amiss at the end."""
    starts: int = 0
    steps: int = 0
    """At the end."""

    def __post_init__(self) -> None:
        self._began = 0.0
        self._trains = threading.Event()
        self._over = threading.Event()

    def plan(self) -> list[Fault]:
        """The faults in order: the last leaves the last start alone for an interval, to be weighed."""
        count = max(1, int(self.seconds / self.interval) - 1)
        kinds = [fault for fault in LIVED_THROUGH if self.scene.disk or not fault.needs_disk]
        ending, lived = iter(cycle(ENDING)), iter(cycle(kinds))
        last = count - self.restarts_last
        return [
            next(ending) if number < self.restarts_first or number >= last else next(lived) for number in range(count)
        ]

    def go(self) -> None:
        """Everything; afterwards the processes have ended and the results are here."""
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
        self._judge_journal()

    @property
    def now(self) -> float:
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
        """The start that lived longest, and when it was first and last seen."""
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
            if run.poll() is not None:  # it did not live through the one before
                self._start(None)
            if fault.ends:
                self._trains.clear()
            fault.inject(self.scene)
            (self._end_and_start if fault.ends else self._live_on)(fault, injected)
        except TimeoutError as error:
            injected.failure = str(error)
        injected.survived = not injected.failure

    def _live_on(self, fault: Fault, injected: Injected) -> None:
        run, began = self.scene.run, time.monotonic()
        step = run.step()
        wait_for(lambda: run.step() > step or run.poll() is not None, MENDED_SECONDS, "a step")
        injected.seconds_to_step = time.monotonic() - began
        if run.poll() is not None:
            injected.exit_code = run.poll()
            injected.failure = f"it ended: {run.output()[-1000:]}"

    def _end_and_start(self, fault: Fault, injected: Injected) -> None:
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
            injected.failure = f"the damaged checkpoint of step {newest} is not named: {run.output()[:1000]}"

    def _start(self, injected: Injected | None) -> None:
        run = self.scene.run
        self._trains.clear()
        self.starts += 1
        run.start()
        wait_for(lambda: self._has_stepped(run) or run.poll() is not None, START_SECONDS, "a step")
        if run.poll() is not None:
            raise TimeoutError(f"started again, it ended with {run.poll()}: {run.output()[-1000:]}")
        if injected:
            injected.seconds_to_step = time.time() - run.started
        self._trains.set()

    @staticmethod
    def _has_stepped(run: Run) -> bool:
        """Whether the journal has grown since it was taken up again: that is at the newest whole checkpoint's step."""
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
            self.failures.append(f"stopped, it ended with exit code {run.poll()}: {run.output()[-1000:]}")

    def _judge_journal(self) -> None:
        keys = [key(record) for record in self.scene.run.records()]
        steps = [step for step, kind in keys if kind == "train"]
        self.steps = steps[-1]
        if steps != list(range(1, self.steps + 1)):
            self.failures.append("the journal misses steps, or has some twice")
        if len(set(keys)) < len(keys):
            self.failures.append("the journal has evaluations twice")

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
    """By how much of it the memory of the training processes has grown."""
    return None if before is None or after is None else after.total / before.total - 1


def flat(windows: Sequence[Window | None]) -> bool:
    """Whether neither memory nor descriptors nor processes have become more than in the first window."""
    if None in windows:
        return False
    first, *others = windows
    return all(
        growth(first, other) <= LARGEST_GROWTH
        and other.files <= first.files + SPARE_FILES
        and other.processes <= first.processes
        for other in others
    )
