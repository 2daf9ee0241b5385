"""What is said at the end of a run, and of a sweep."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from hpcm_scale.sweeps.jobs import Job
from hpcm_scale.sweeps.log import last_mark, lives, tail
from hpcm_scale.sweeps.plan import plan_of
from hpcm_scale.sweeps.state import Follower, RunState
from hpcm_scale.sweeps.table import clock, console, table


def at_end(job: Job, state: RunState, failure: str | None = None) -> RunState:
    """The state of a job whose processes have ended, though its files may have been written just now."""
    if failure is not None:
        return replace(state, state="failed", note=failure, seconds_left=None)
    if state.state == "running" and not lives(last_mark(tail(job.log))):  # unless they are those of another call
        return replace(state, state="stopped", seconds_left=None)
    return state


def sentence(job: Job, state: RunState) -> str:
    """One line on how a job ended."""
    if state.state == "failed":
        return f"{job.name}: failed: {state.note}"
    text = f"{job.name}: {state.state}"
    if state.state == "stopped":
        text += f" at step {state.step:,} of {job.config.train.steps:,}"
    if state.loss is not None:
        text += f", {'evaluation' if state.evaluated else 'training'} loss {state.loss:.4f}"
    if state.pflops is not None:
        text += f", {state.pflops:,.4g} PFLOPs in {clock(state.seconds)}"
    return text


def summary(jobs: Sequence[Job], skipped: Collection[str] = (), failures: Mapping[str, str] | None = None) -> int:
    """Print the table of all jobs of a multirun; returns the exit code, 0 if all are trained as far as was asked.

    `skipped` are the names of those that had been finished before, `failures` say why others failed.
    """
    states = []
    for job in jobs:
        state = at_end(job, Follower(job.folder, plan_of(job)).look(), (failures or {}).get(job.name))
        states.append(replace(state, state="skipped") if job.name in skipped else state)
    console().print(table(states))
    reached = [
        state.state in ("finished", "skipped") or (state.state == "stopped" and state.step >= job.last_step)
        for job, state in zip(jobs, states, strict=True)
    ]
    if not all(reached):
        print(f"{len(jobs) - sum(reached)} of {len(jobs)} runs are not finished; the same command goes on with them")
    return 0 if all(reached) else 1
