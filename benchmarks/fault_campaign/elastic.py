"""Elastic resume: stopped on two processes with one engine, resumed on other processes with another engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fork_server import ForkServer

from fault_campaign.runs import Run, ended_with, key

EXACT = ("train/images", "train/learning_rate", "compute/pflops")
TOLERANCE = 1e-5
"""Largest relative difference of losses."""
START = 2
"""Processes of the first part of every run."""


@dataclass
class Cell:
    """One transition. Differences are the largest relative ones from the uninterrupted run, after the resume."""

    before: str
    """Engine of the first part."""
    after: str
    processes: int
    """Processes of the second part."""
    loss: float | None = None
    grad_norm: float | None = None
    evaluation: float | None = None
    exact: bool = False
    """Whether steps, images, PFLOPs and learning rate equal the uninterrupted run's."""
    failure: str = ""

    @property
    def good(self) -> bool:
        """Whether the losses are within the tolerance."""
        losses = (self.loss, self.evaluation)
        return self.exact and not self.failure and all(loss is not None and loss < TOLERANCE for loss in losses)


@dataclass
class ElasticCampaign:
    """Runs all transitions; `cells` holds the results."""

    folder: Path
    overrides: Sequence[str]
    """Overrides of every run; all numbers of processes divide `train.batch_size`."""
    first: int = 4
    """Steps before the change."""
    more: int = 4
    """Steps after it."""
    forks: ForkServer | None = None
    advance: Callable[[], Any] = lambda: None
    """Called after each cell."""
    cells: list[Cell] = field(default_factory=list)

    def run(self, transitions: Sequence[tuple[str, str, int]]) -> None:
        """Run transitions: the engine before, the engine and the number of processes after."""
        for engine in dict.fromkeys(before for before, _, _ in transitions):
            uninterrupted = self._train(f"uninterrupted_{engine}", engine)
            self._train(f"from_{engine}", engine, stop=True)
            for before, after, processes in transitions:
                if before == engine:
                    self.cells.append(self._resume(Cell(before, after, processes), uninterrupted))
                    self.advance()

    def _train(self, name: str, engine: str, stop: bool = False) -> Run:
        run = self._run(name, engine, START)
        if stop:
            run.overrides.append(f"train.stop_after={self.first}")
        with ended_with(run):
            code = run.finish(self.forks)
        if code:
            raise RuntimeError(f"{name} exited with code {code}: {run.output()[-2000:]}")
        return run

    def _run(self, name: str, engine: str, processes: int) -> Run:
        steps = self.first + self.more
        every = [f"train.steps={steps}", f"train.checkpoint_every={self.first}", f"eval.every={self.first}"]
        return Run(self.folder / name, [*self.overrides, *every, f"engine={engine}"], processes)

    def _resume(self, cell: Cell, uninterrupted: Run) -> Cell:
        name = f"{cell.before}_to_{cell.after}_on_{cell.processes}"
        shutil.copytree(self.folder / f"from_{cell.before}", self.folder / name)
        run = self._run(name, cell.after, cell.processes)
        with ended_with(run):
            try:
                code = run.finish(self.forks)
            except TimeoutError as error:
                cell.failure = str(error)
                return cell
        if code:
            cell.failure = f"exit code {code}: {run.output()[-500:]}"
            return cell
        found, expected = run.records(), uninterrupted.records()
        cell.exact = [_exact(record) for record in found] == [_exact(record) for record in expected]
        if cell.exact:
            later = [pair for pair in zip(found, expected, strict=True) if pair[0]["step"] > self.first]
            cell.loss = _difference(later, "train/loss")
            cell.grad_norm = _difference(later, "train/grad_norm")
            cell.evaluation = _difference(later, "eval/loss")
        return cell


def transitions(engines: Sequence[str], starts: Sequence[str], processes: Sequence[int]) -> list[tuple[str, str, int]]:
    """From every engine to every engine on `START` processes; from `starts` also to other numbers of `processes`."""
    same = [(before, after, START) for before in engines for after in engines]
    return same + [(before, after, n) for before in starts for after in engines for n in processes]


def _exact(record: dict[str, Any]) -> tuple[Any, ...]:
    return *key(record), *(record.get(name) for name in EXACT)


def _difference(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], name: str) -> float:
    return max(abs(ours[name] - theirs[name]) / abs(theirs[name]) for ours, theirs in pairs if name in theirs)
