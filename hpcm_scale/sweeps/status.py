"""Progress of runs, read from the files in and beside their folders, as a table."""

from __future__ import annotations

import os
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from yaml import YAMLError

from hpcm_scale.errors import STOPPED, UserError
from hpcm_scale.formatting import duration
from hpcm_scale.scaling.filters import smoothed
from hpcm_scale.scaling.runs import CONFIG_NAME
from hpcm_scale.sweeps.forecast import forecast
from hpcm_scale.sweeps.jobs import (
    FILE_NAME,
    Job,
    Planned,
    last_error,
    last_mark,
    lives,
    log_of,
    planned,
    read_plan,
    tail,
)
from hpcm_scale.tracking import journal

# The state of a run, from its journal, configuration and log.


QUIET_SECONDS = 120.0
"""A run on another node counts as stopped if its files have not changed for this time and for four times the longest
recent interval between journal lines."""
RECENT = 20
"""Journal lines from which the speed is estimated."""
MEASURES = ("loss", "bpp", "psnr")
_TRAINING = ("train/learning_rate", *(f"train/{key}" for key in MEASURES))


@dataclass(frozen=True)
class RunState:
    """State of one run, a row of the table."""

    folder: Path
    plan: Planned | None
    """None if it cannot be read."""
    state: str
    """waiting, running, finished, stopped, failed; or stopping, from a launcher."""
    note: str = ""
    """Why it failed or cannot be read, and its log."""
    step: int = 0
    loss: float | None = None
    bpp: float | None = None
    """Bits per pixel."""
    psnr: float | None = None
    """dB."""
    evaluated: bool = False
    """Whether loss, bpp and PSNR are of the last evaluation, not the ends of the smoothed training curves."""
    pflops: float | None = None
    """Training compute so far, 1e15 FLOP."""
    seconds: float | None = None
    """Training time so far."""
    seconds_left: float | None = None
    forecast: float | None = None
    """Training loss at the last step if the curve goes on as it does (`forecast`); of a run that trains."""

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.folder.name


class Follower:
    """Follows a run: each `look` reads only the journal lines that are new."""

    def __init__(self, folder: Path, plan: Planned | None = None) -> None:
        self.folder = folder
        self._file = folder / journal.FILE_NAME
        self._plan = plan
        self._config_time = 0
        self._journal: BinaryIO | None = None
        self._forget()

    def look(self) -> RunState:
        """The current state. A malformed journal is reported in its note."""
        self._read_config()
        self._read_journal()
        note = self._damage
        log = tail(log_of(self.folder))
        state = self._state(log)
        if state == "failed":
            note = f"{last_error(log)} (log: {log_of(self.folder)})"
        measured = {key: self._evaluation.get(f"eval/{key}") for key in MEASURES} if self._evaluation else self._ends()
        step, seconds = (self._last.get(key) for key in ("step", "time"))
        return RunState(
            folder=self.folder,
            plan=self._plan,
            state=state,
            note=note,
            step=step or 0,
            **measured,
            evaluated=bool(self._evaluation),
            pflops=self._last.get("compute/pflops"),
            seconds=seconds,
            seconds_left=self._seconds_left() if state == "running" else None,
            forecast=self._forecast() if state == "running" else None,
        )

    def _forget(self) -> None:
        self._damage = ""
        self._last: dict[str, Any] = {}
        self._training = {key: array("d") for key in ("compute/pflops", *_TRAINING, "train/images")}
        self._forecast_at: tuple[int, float | None] = (0, None)
        self._evaluation: dict[str, Any] = {}
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)

    def _read_config(self) -> None:
        file = self.folder / CONFIG_NAME
        changed = _changed(file)
        if changed in (None, self._config_time):
            return
        try:
            self._plan = planned(OmegaConf.to_container(OmegaConf.load(file)))
            self._config_time = changed
        except (YAMLError, OmegaConfBaseException, OSError, KeyError, TypeError, ValueError):
            return  # incomplete, or not of a run

    def _read_journal(self) -> None:
        """Read new lines; after a resume, which replaces the journal by a shorter one, read from the start."""
        try:
            if self._journal and not os.path.samestat(self._file.stat(), os.fstat(self._journal.fileno())):
                self._journal.close()
                self._journal = None
                self._forget()
            self._journal = self._journal or self._file.open("rb")
            for record in journal.new_records(self._journal):
                self._take(record)
        except OSError:
            return  # it does not exist yet
        except UserError as error:
            self._damage = str(error)
        except (AttributeError, KeyError):
            self._damage = f"{self._file} has a line without step and time; remove the line"

    def _take(self, record: dict[str, Any]) -> None:
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        self._recent.append((numbers["step"], numbers["time"]))
        self._last = numbers
        if "eval/loss" in numbers:
            self._evaluation = numbers
        elif "train/loss" in numbers:
            before = self._training["compute/pflops"]
            if numbers["compute/pflops"] > (before[-1] if before else 0):  # always, in the journal of one run
                for key, values in self._training.items():
                    values.append(numbers.get(key, np.nan))

    def _ends(self) -> dict[str, float | None]:
        """Ends of the smoothed training curves; a single batch is too noisy."""
        pflops, rates, *measures, _ = map(np.array, self._training.values())

        def end(values: np.ndarray) -> float | None:
            known = np.isfinite(values)
            return float(smoothed(pflops[known], values[known], rates[known])[-1]) if known.any() else None

        return dict(zip(MEASURES, map(end, measures), strict=True))

    def _seconds_left(self) -> float | None:
        if len(self._recent) < 2 or self._plan is None:
            return None
        (first, began), (last, ended) = self._recent[0], self._recent[-1]
        return (self._plan.steps - last) * (ended - began) / (last - first) if last > first else None

    def _forecast(self) -> float | None:
        """`forecast`, anew whenever the journal is 2 % longer."""
        lines = len(self._training["compute/pflops"])
        if self._plan and self._last and lines > 1.02 * self._forecast_at[0]:
            pflops, rates, losses, *_, images = map(np.array, self._training.values())
            known = np.isfinite(losses)
            curve = smoothed(pflops[known], losses[known], rates[known])
            self._forecast_at = lines, forecast(curve, images[known], self._plan.steps / self._last["step"])
        return self._forecast_at[1]

    def _state(self, log: str) -> str:
        mark = last_mark(log)
        if lives(mark):
            return "running"
        written, logged = (_changed(path) or 0 for path in (self._file, log_of(self.folder)))
        ended = mark is not None and mark.kind == "ended" and logged >= written
        if mark and ended and mark.failed:
            return "failed"  # also after the last step: evaluation, checkpoint or export may be missing
        if self._plan and self._last and self._last["step"] >= self._plan.steps:
            return "finished"
        here = mark is not None and mark.group is not None  # of this node, and no process is left
        begun = self.folder.is_dir()
        waiting = mark is not None and mark.kind == "submitted" and logged >= written
        if begun and not (ended or here or waiting) and self._lately(max(written, logged)):
            return "running"
        return "stopped" if begun and not waiting else "waiting"

    def _lately(self, nanoseconds: int) -> bool:
        times = [seconds for _, seconds in self._recent]
        longest = max((after - before for before, after in pairwise(times)), default=0.0)
        newest = nanoseconds or _changed(self.folder / CONFIG_NAME) or 0
        return time.time() - newest / 1e9 < max(QUIET_SECONDS, 4 * longest)


def _changed(path: Path) -> int | None:
    """Modification time of a file in nanoseconds; None if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


# All runs below some folders.


def _found_below(folder: Path) -> Iterator[tuple[Path, Planned | None]]:
    """Run folders in `folder` and below it, in order of name, including those of sweep.json that do not exist yet."""
    if (folder / CONFIG_NAME).is_file() or (folder / journal.FILE_NAME).is_file():
        yield folder, None
        return
    plan = read_plan(folder)
    present = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    for name in [*plan, *sorted(present - plan.keys())]:
        if name in plan:
            yield folder / name, plan[name]
        else:
            yield from _found_below(folder / name)


def look(folders: Sequence[Path], followers: dict[Path, Follower]) -> list[RunState]:
    """The state of every run below the folders; `followers`, empty at first, read only what is new.

    Raises UserError without runs, or for a malformed sweep.json.
    """
    found: dict[Path, Planned | None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                "missing-sweep-folder",
                "",
                f"{folder} does not exist; give a sweep's folder, such as runs/sweep_model",
            )
        below = dict(_found_below(folder.resolve()))
        if not below:
            raise UserError(
                "no-runs-in-sweep-folder",
                "",
                f"{folder} contains neither run folders nor {FILE_NAME}; check that training has started",
            )
        found |= below
    return [followers.setdefault(path, Follower(path, plan)).look() for path, plan in found.items()]


# The table of the runs of a sweep.


STYLES = {"finished": "green", "running": "cyan", "failed": "red", "stopped": "yellow"}
PIPE_WIDTH = 200
"""Columns of the table without a terminal."""


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal, or `PIPE_WIDTH` without one."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def table(states: Sequence[RunState], remark: str = "") -> Group:
    """One row per run, then the reasons of failures and `remark`."""
    # No model column if it repeats the names of the runs.
    named = all(state.plan is None or f"model={state.plan.model}" in state.name for state in states)
    grid = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    grid.add_column("run", overflow="fold")
    if not named:
        grid.add_column("model")
    forecasts = ["forecast"] if any(state.forecast is not None for state in states) else []
    for heading in ("size", "step", "loss", "bpp", "PSNR", "PFLOPs", "elapsed", "to go", *forecasts):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("state", no_wrap=True)
    for state, name in zip(states, _names(states), strict=True):
        model = [] if named else [state.plan.model if state.plan else "?"]
        grid.add_row(
            Text(name),
            *map(Text, model),
            *_row(state, bool(forecasts)),
            style="dim" if state.state == "waiting" else None,
        )
    notes = [
        Text(f"{name}: {state.note}", style="red")
        for state, name in zip(states, _names(states), strict=True)
        if state.note
    ]
    if any(state.loss is not None and not state.evaluated for state in states):
        notes.insert(0, Text("* smoothed training loss, not evaluated yet", style="dim"))
    return Group(grid, *notes, *([Text(remark)] if remark else []))


def _names(states: Sequence[RunState]) -> list[str]:
    """Names of the run folders, or their paths below a common folder if names are not unique."""
    if len({state.name for state in states}) == len(states):
        return [state.name for state in states]
    folders = [state.folder.absolute() for state in states]
    top = os.path.commonpath([folder.parent for folder in folders])
    return [os.path.relpath(folder, top) for folder in folders]


def _row(state: RunState, forecasts: bool) -> list[str | Text]:
    plan = state.plan
    return [
        f"{plan.parameters / 1e6:,.2f} M" if plan and plan.parameters else "?",
        f"{state.step:,}/{plan.steps:,}" if plan else f"{state.step:,}",
        _number(state.loss, "#.4g", "" if state.evaluated else "*"),
        _number(state.bpp, ".4f"),
        _number(state.psnr, ".2f"),
        _number(state.pflops, ",.3g"),
        duration(state.seconds),
        duration(state.seconds_left),
        *([_number(state.forecast, "#.4g")] if forecasts else []),
        Text(state.state, style=STYLES.get(state.state, "")),
    ]


def _number(value: float | None, form: str, mark: str = "") -> str:
    return "" if value is None else f"{value:{form}}{mark}"


# The summary at the end of a run and of a sweep.


def at_end(job: Job, state: RunState, failure: str | None = None) -> RunState:
    """The state of a job whose processes have ended, even if its files are recent."""
    if failure is not None:
        return replace(state, state="failed", note=failure, seconds_left=None)
    state = replace(state, step=max(state.step, job.reached))
    if state.state == "running" and not lives(last_mark(tail(job.log))):  # unless another command trains it
        return replace(state, state="stopped", seconds_left=None)
    return state


def sentence(job: Job, state: RunState) -> str:
    """One line on the end of a job."""
    if state.state == "failed":
        return f"{job.folder}: failed: {state.note}"
    text = f"{job.folder}: {state.state}"
    if state.state == "stopped":
        text += f" at step {state.step:,} of {job.config.train.steps:,}"
    if state.loss is not None:
        kind, remark = ("evaluation", "") if state.evaluated else ("training", " (smoothed)")
        text += f", {kind} loss {state.loss:.4f}{remark}"
    if state.pflops is not None:
        text += f", {state.pflops:,.4g} PFLOPs in {duration(state.seconds)}"
    return text


def summary(jobs: Sequence[Job], left: Sequence[Job], failures: Mapping[Path, str] = MappingProxyType({})) -> int:
    """Print the table of all jobs of a multirun; returns the exit code.

    Args:
        jobs: all jobs.
        left: those that had training left.
        failures: errors by run folder.

    Returns:
        0 if all jobs are trained to their last step, 1 if one failed, `STOPPED` otherwise.
    """
    states = []
    for job in jobs:
        state = at_end(job, Follower(job.folder, job.plan).look(), failures.get(job.folder))
        if job not in left:  # its log is of an earlier start
            state = replace(state, state="finished" if state.step >= job.config.train.steps else "stopped", note="")
        states.append(state)
    console().print(table(states))
    trained = [
        state.state == "finished" or (state.state == "stopped" and job.reached >= job.last_step)
        for job, state in zip(jobs, states, strict=True)
    ]
    if not all(trained):
        print(f"{len(jobs) - sum(trained)} of {len(jobs)} runs are not finished; the same command resumes them")
    if any(state.state == "failed" for state in states):
        return 1
    return 0 if all(trained) else STOPPED
