"""The table of a sweep's runs, and its summary at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from hpcm_scale.errors import STOPPED
from hpcm_scale.sweeps.jobs import Job, last_mark, lives, plan_of, tail
from hpcm_scale.sweeps.state import Follower, RunState

# The table of a sweep's runs.


STYLES = {"finished": "green", "running": "cyan", "failed": "red", "stopped": "yellow"}
PIPE_WIDTH = 200
"""Columns where nobody's terminal limits them."""


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; in a pipe wide enough for every column."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def table(states: Sequence[RunState], remark: str = "") -> Group:
    """Runs by lines: size, steps, loss, rate, distortion, compute, time, state; then why some failed, and a remark."""
    # A column that only repeats the names of the runs would take the place of others.
    named = all(state.plan is None or f"model={state.plan.model}" in state.name for state in states)
    grid = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    grid.add_column("run", overflow="fold")
    if not named:
        grid.add_column("model")
    for heading in ("size", "step", "loss", "bpp", "PSNR", "PFLOPs", "elapsed", "to go"):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("state", no_wrap=True)
    for state, name in zip(states, _names(states), strict=True):
        model = [] if named else [state.plan.model if state.plan else "?"]
        grid.add_row(Text(name), *map(Text, model), *_row(state), style="dim" if state.state == "waiting" else None)
    notes = [
        Text(f"{name}: {state.note}", style="red")
        for state, name in zip(states, _names(states), strict=True)
        if state.note
    ]
    if any(state.loss is not None and not state.evaluated for state in states):
        notes.insert(0, Text("* of training, smoothed: not evaluated yet", style="dim"))
    return Group(grid, *notes, *([Text(remark)] if remark else []))


def _names(states: Sequence[RunState]) -> list[str]:
    """The names of the run folders or, where several have the same, where they lie below what they have in common."""
    if len({state.name for state in states}) == len(states):
        return [state.name for state in states]
    folders = [state.folder.absolute() for state in states]
    top = os.path.commonpath([folder.parent for folder in folders])
    return [os.path.relpath(folder, top) for folder in folders]


def _row(state: RunState) -> list[str | Text]:
    plan = state.plan
    return [
        f"{plan.parameters / 1e6:,.2f} M" if plan and plan.parameters else "?",
        f"{state.step:,}/{plan.steps:,}" if plan else f"{state.step:,}",
        _number(state.loss, "#.4g", "" if state.evaluated else "*"),
        _number(state.bpp, ".4f"),
        _number(state.psnr, ".2f"),
        _number(state.pflops, ",.3g"),
        clock(state.seconds),
        clock(state.seconds_left),
        Text(state.state, style=STYLES.get(state.state, "")),
    ]


def _number(value: float | None, form: str, mark: str = "") -> str:
    return "" if value is None else f"{value:{form}}{mark}"


def clock(seconds: float | None) -> str:
    """A time as 59 s, 12:59 (minutes), 3:00 h or 12.5 d; empty for None."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    if whole < 172800:
        return f"{whole // 3600}:{whole // 60 % 60:02d} h"
    return f"{whole / 86400:.1f} d"


# What is said at the end of a run, and of a sweep.


def at_end(job: Job, state: RunState, failure: str | None = None) -> RunState:
    """The state of a job whose processes have ended, though its files may have been written just now."""
    if failure is not None:
        return replace(state, state="failed", note=failure, seconds_left=None)
    state = replace(state, step=max(state.step, job.reached))
    if state.state == "running" and not lives(last_mark(tail(job.log))):  # unless they are those of another call
        return replace(state, state="stopped", seconds_left=None)
    return state


def sentence(job: Job, state: RunState) -> str:
    """One line on how a job ended."""
    if state.state == "failed":
        return f"{job.folder}: failed: {state.note}"
    text = f"{job.folder}: {state.state}"
    if state.state == "stopped":
        text += f" at step {state.step:,} of {job.config.train.steps:,}"
    if state.loss is not None:
        kind, remark = ("evaluation", "") if state.evaluated else ("training", " (smoothed)")
        text += f", {kind} loss {state.loss:.4f}{remark}"
    if state.pflops is not None:
        text += f", {state.pflops:,.4g} PFLOPs in {clock(state.seconds)}"
    return text


def summary(jobs: Sequence[Job], left: Sequence[Job], failures: Mapping[Path, str] = MappingProxyType({})) -> int:
    """Print the table of all jobs of a multirun; returns the exit code.

    That is 0 if all are trained as far as was asked, 1 if one failed, and otherwise `STOPPED`. `left` are those that
    had not been finished before, `failures` say by folders why some failed.
    """
    states = []
    for job in jobs:
        state = at_end(job, Follower(job.folder, plan_of(job)).look(), failures.get(job.folder))
        if job not in left:  # whatever its log says of an earlier start
            state = replace(state, state="finished" if state.step >= job.config.train.steps else "stopped", note="")
        states.append(state)
    console().print(table(states))
    trained = [
        state.state == "finished" or (state.state == "stopped" and job.reached >= job.last_step)
        for job, state in zip(jobs, states, strict=True)
    ]
    if not all(trained):
        print(f"{len(jobs) - sum(trained)} of {len(jobs)} runs are not finished; the same command goes on with them")
    if any(state.state == "failed" for state in states):
        return 1
    return 0 if all(trained) else STOPPED
