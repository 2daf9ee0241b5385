"""Trains the jobs of a multirun one after the other, in this process and those that were launched with it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from hpcm_scale.distributed import processes
from hpcm_scale.errors import STOPPED, UserError, is_first_process
from hpcm_scale.sweeps.jobs import Job, unfinished, write_plans
from hpcm_scale.sweeps.table import summary
from hpcm_scale.training.run import run


def train_in_turn(jobs: Sequence[Job]) -> int:
    """Train all; a job that fails does not keep the others from being trained. Returns the exit code.

    Raises UserError for what any job would be refused for, before the first one starts. Where there are several
    processes, an error that others may not have met ends them all: they could not go on together.
    """
    world_size = processes.world_size()
    left = unfinished(jobs, world_size, in_turn=True)
    if is_first_process():
        write_plans(jobs)
    failures: dict[Path, str] = {}
    stopped = False
    for job in left:
        try:
            done, asked = run(job.config)
        except Exception as error:
            common = isinstance(error, UserError) and not error.local
            if world_size > 1 and not common:
                raise
            failures[job.folder] = _told(job, error)
            continue
        stopped = asked and not (done and job is left[-1])
        if stopped:
            break
    code = summary(jobs, left, failures) if is_first_process() else 0
    if failures:
        return 1
    return STOPPED if stopped else code


def _told(job: Job, error: Exception) -> str:
    """Tell of a failure at once, and give it in a line."""
    if not isinstance(error, UserError):
        traceback.print_exception(error, file=sys.stderr)
    line = " ".join(str(error).split()) or type(error).__name__
    if is_first_process():
        sys.stderr.write(f"hpcm: {job.folder}: {line}\n")
    return line
