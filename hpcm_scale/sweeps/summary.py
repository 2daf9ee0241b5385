"""What is said at the end of a run, and of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from hpcm_scale.errors import STOPPED
from hpcm_scale.sweeps.jobs import Job
from hpcm_scale.sweeps.log import last_mark, lives, tail
from hpcm_scale.sweeps.plan import plan_of
from hpcm_scale.sweeps.state import Follower, RunState
from hpcm_scale.sweeps.table import clock, console, table


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
