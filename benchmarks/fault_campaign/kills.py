"""Kill -9 at random moments, after which the same command is run again."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
from fork_server import ForkServer

from fault_campaign.runs import POLL_SECONDS, Run, ended_with, key, kill, numbers, same_weights, wait_for

FAULTS = ("one rank", "the launcher", "all")
MOMENTS = ("start-up", "step", "evaluation", "checkpoint", "export")
_DRAWN = ("step", "checkpoint", "evaluation", "checkpoint", "step", "start-up", "evaluation")
"""Moments of all kills except the last one of each run, which is during the export."""
START_SECONDS = 300.0
"""Longest time from the command to its first step, on a busy machine."""


@dataclass
class Shape:
    """Length of a run, and intervals of evaluations and checkpoints, steps."""

    steps: int = 30
    evaluate_every: int = 5
    checkpoint_every: int = 3

    def overrides(self) -> list[str]:
        """The overrides."""
        return [
            f"train.steps={self.steps}",
            f"eval.every={self.evaluate_every}",
            f"train.checkpoint_every={self.checkpoint_every}",
        ]


@dataclass
class Kill:
    """One kill and its outcome."""

    run: str
    engine: str
    fault: str
    aimed: str
    moment: str = ""
    """Activity of the run at the kill."""
    victims: list[str] = field(default_factory=list)
    step: int = 0
    """Last step in the journal after the kill."""
    recomputed: int | None = None
    """Steps since the checkpoint from which the run resumed."""
    seconds_to_end: float | None = None
    """From the kill until no process of the run remained."""
    seconds_to_step: float | None = None
    """From the restart to the next journal line; None if there was none before the next kill."""
    lost: int = 0
    """Missing journal lines at the next check."""
    repeated: int = 0
    differing: int = 0
    failure: str = ""

    @property
    def survived(self) -> bool:
        """Whether no data was lost."""
        return not self.failure and self.lost == self.repeated == self.differing == 0


@dataclass
class Ending:
    """The end of a run, compared with the uninterrupted one."""

    run: str
    engine: str
    kills: int
    lines: int
    same_journal: bool
    same_weights: bool
    litter: list[str]
    """Unfinished files and checkpoints that were not removed."""


@dataclass
class KillCampaign:
    """Kills runs one after the other; `kills` and `endings` hold the results."""

    folder: Path
    overrides: Sequence[str]
    """Overrides of every run: model, data, batch size."""
    engines: Sequence[str]
    """Engines of the runs, in rotation."""
    shape: Shape
    random: random.Random
    forks: ForkServer | None = None
    """Starts runs whose launcher is not killed; None: DeepSpeed's launcher starts all."""
    advance: Callable[[], Any] = lambda: None
    """Called after each kill."""
    kills: list[Kill] = field(default_factory=list)
    endings: list[Ending] = field(default_factory=list)
    uninterrupted: dict[str, Run] = field(default_factory=dict)
    """The uninterrupted run of each engine."""
    export_seconds: float = 0.1
    """From the last checkpoint to the weights, as last measured."""
    start_seconds: dict[bool, float] = field(default_factory=lambda: {False: 8.0, True: 3.0})
    """From the command to its first step, as last measured, by whether processes are forked."""

    def inject(self, count: int, runs: int) -> None:
        """Kill `count` times in about `runs` runs; the last kill of each is during its export."""
        cells = list(islice(zip(cycle(FAULTS), cycle(_DRAWN), strict=False), count - runs))
        self.random.shuffle(cells)
        exports = list(islice(cycle(FAULTS), runs))
        self.random.shuffle(exports)
        waiting, number = deque(cells), 0
        while waiting or exports:
            share = -(-len(waiting) // max(len(exports), 1))
            plan = [waiting.popleft() for _ in range(share)]
            if exports:
                plan.append((exports.pop(), "export"))
            number += 1
            left = self._break(number, deque(plan))
            exports += [fault for fault, moment in left if moment == "export"]
            waiting.extend((fault, moment) for fault, moment in left if moment != "export")

    def reference(self, engine: str) -> Run:
        """The uninterrupted run with an engine, trained on first use."""
        if engine not in self.uninterrupted:
            run = Run(self.folder / f"uninterrupted_{engine}", [*self._overrides(engine)])
            with ended_with(run):
                code = run.finish(self.forks)
            if code:
                raise RuntimeError(f"the run with {engine} exited with code {code}: {run.output()[-2000:]}")
            manifest = run.checkpoints / f"step_{self.shape.steps:08d}" / "complete.json"
            self.export_seconds = run.weights.stat().st_mtime - manifest.stat().st_mtime
            self.uninterrupted[engine] = run
        return self.uninterrupted[engine]

    def _overrides(self, engine: str) -> list[str]:
        return [*self.overrides, *self.shape.overrides(), f"engine={engine}"]

    def _break(self, number: int, plan: deque[tuple[str, str]]) -> list[tuple[str, str]]:
        """Kill one run as planned and finish it; returns the kills that were not possible before its end."""
        engine = self.engines[(number - 1) % len(self.engines)]
        reference = self.reference(engine)
        run = Run(self.folder / f"broken_{number:02d}_{engine}", self._overrides(engine))
        before: Kill | None = None
        done = 0
        with ended_with(run):
            while plan and not run.weights.exists():
                hit = self._start_and_kill(run, engine, plan[0], before)
                if hit is None:  # it ended first
                    if run.poll():
                        self._fail(before, f"exit code {run.poll()} after the kill: {run.output()[-1000:]}")
                    break
                plan.popleft()
                self._compare(run, reference, before)
                before = hit
                self.kills.append(hit)
                done += 1
                self.advance()
            self._finish(run, reference, before)
            same_journal = numbers(run.records()) == numbers(reference.records())
            weights = run.weights.exists() and same_weights(run.weights, reference.weights)
            name, lines = run.folder.name, len(run.records())
            self.endings.append(Ending(name, engine, done, lines, same_journal, weights, _litter(run)))
        return list(plan)

    def _finish(self, run: Run, reference: Run, before: Kill | None) -> None:
        """Start the command again unless it is running, and wait for its end."""
        if run.poll() is not None:
            newest = run.newest()
            run.start(self.forks)
            self._wait_for_step(run, newest, before)
        try:
            wait_for(lambda: run.poll() is not None, START_SECONDS, "the end of the run")
            run.wait_until_gone()
        except TimeoutError as error:
            self._fail(before, str(error))
        if run.poll():
            self._fail(before, f"exit code {run.poll()}: {run.output()[-1000:]}")
        self._compare(run, reference, before)

    def _start_and_kill(self, run: Run, engine: str, planned: tuple[str, str], before: Kill | None) -> Kill | None:
        """Start the command, wait for the moment, kill, and wait until all have ended; None if it ended first."""
        fault, aimed = planned
        shape, newest = self.shape, run.newest()
        unfinished = _unfinished(run)
        hit = Kill(run.folder.name, engine, fault, aimed)
        if before:
            before.recomputed = before.step - newest
        run.start(None if fault == "the launcher" else self.forks)
        if aimed == "start-up":
            if fault == "one rank":
                wait_for(lambda: run.ranks() or run.poll() is not None, START_SECONDS, "a rank")
            time.sleep(self.random.uniform(0, self.start_seconds[run.forked]))
        elif not self._wait_for_step(run, newest, before):
            return None
        victims = self._victims(run, fault, hit)
        if not victims or run.poll() is not None:
            return None
        if aimed != "start-up" and not self._reach(run, aimed, unfinished, engine):
            return None
        kill(victims)
        killed = time.monotonic()
        hit.moment = moment_of(run, newest, unfinished, shape)
        if fault == "all":
            kill(run.members())  # processes started meanwhile
        try:
            run.wait_until_gone()
        except TimeoutError as error:
            self._fail(hit, str(error))
        hit.seconds_to_end = time.monotonic() - killed
        hit.step = run.step()
        return hit

    def _victims(self, run: Run, fault: str, hit: Kill) -> list[psutil.Process]:
        ranks, launchers = run.ranks(), run.launchers()
        names = {process: f"rank {number}" for number, process in enumerate(ranks)}
        names |= dict(zip(launchers, ("runner", "launch.py"), strict=False))
        if fault == "all":
            hit.victims = ["all"]
            return run.members()
        possible = ranks if fault == "one rank" else launchers
        if not possible:
            return []
        chosen = self.random.choice(possible)
        hit.victims = [names[chosen]]
        return [chosen]

    def _reach(self, run: Run, aimed: str, unfinished: set, engine: str) -> bool:
        """Wait for the planned activity and a random time longer; False if the run ends first."""
        records = self.reference(engine).records()
        times = {key(record): record["time"] for record in records}
        step_seconds = times[(2, "train")] - times[(1, "train")]
        first = self.shape.evaluate_every
        evaluation_seconds = times[(first, "eval")] - times[(first, "train")]
        target = len(run.records()) + self.random.randrange(1, 4)
        condition, longest = {
            "step": (lambda: len(run.records()) >= target, step_seconds),
            "evaluation": (lambda: _evaluates(run, self.shape), 0.8 * evaluation_seconds),
            "checkpoint": (lambda: bool(_unfinished(run) - unfinished), 0.05),
            "export": (lambda: run.newest() == self.shape.steps, 0.8 * self.export_seconds),
        }[aimed]
        while not condition():
            if run.poll() is not None:
                return False
            time.sleep(POLL_SECONDS)
        time.sleep(self.random.uniform(0, longest))
        return run.poll() is None and not run.weights.exists()

    def _wait_for_step(self, run: Run, newest: int, before: Kill | None) -> bool:
        """Wait for the first new journal line, if a step remains; False if the run ended."""
        if newest < self.shape.steps:
            wait_for(lambda: run.new_steps(newest) > 0 or run.poll() is not None, START_SECONDS, "a step")
            if run.new_steps(newest) > 0:
                self.start_seconds[run.forked] = time.time() - run.started
                if before:
                    before.seconds_to_step = self.start_seconds[run.forked]
        if before:
            before.recomputed = before.step - newest
        return run.poll() is None

    def _compare(self, run: Run, reference: Run, before: Kill | None) -> None:
        """Compare the journal with the uninterrupted one; differences are attributed to the last kill."""
        if before is None:
            return
        found, expected = numbers(run.records()), numbers(reference.records())
        keys = [key(record) for record in found]
        by_key = {key(record): record for record in expected}
        before.repeated = len(keys) - len(set(keys))
        before.lost = len(set(list(by_key)[: len(set(keys))]) - set(keys))
        before.differing = sum(record != by_key.get(key(record)) for record in found)

    @staticmethod
    def _fail(hit: Kill | None, reason: str) -> None:
        if hit is None:
            raise RuntimeError(reason)  # before any kill
        hit.failure = hit.failure or reason


def moment_of(run: Run, newest: int, unfinished: set, shape: Shape) -> str:
    """Activity of a run by its files; `newest` and `unfinished`: checkpoints at its start."""
    if newest < shape.steps and run.new_steps(newest) <= 0:
        return "start-up"
    if _unfinished(run) - unfinished:
        return "checkpoint"
    if _evaluates(run, shape):
        return "evaluation"
    return "export" if _ends(run, shape) else "step"


def _evaluates(run: Run, shape: Shape) -> bool:
    last = run.last()
    due = last is not None and (last["step"] % shape.evaluate_every == 0 or last["step"] == shape.steps)
    return due and key(last)[1] == "train"


def _ends(run: Run, shape: Shape) -> bool:
    """Whether all steps are done and evaluated; only a checkpoint and the export remain."""
    last = run.last()
    return last is not None and key(last) == (shape.steps, "eval")


def _litter(run: Run) -> list[str]:
    parts = [str(path.relative_to(run.folder)) for path in run.folder.rglob("*.part")]
    return sorted([*parts, *(name for name, _ in _unfinished(run))])


def _unfinished(run: Run) -> set[tuple[str, int]]:
    """Name and inode of the incomplete checkpoints."""
    found = set()
    with suppress(FileNotFoundError):
        for folder in run.checkpoints.iterdir():
            with suppress(FileNotFoundError):
                if not (folder / "complete.json").exists():
                    found.add((folder.name, folder.stat().st_ino))
    return found
