"""Runs of a sweep one after the other, in this process and those launched with it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from hpcm_scale.distributed import processes
from hpcm_scale.errors import STOPPED, UserError, is_first_process
from hpcm_scale.sweeps.jobs import Job, unfinished, write_plans
from hpcm_scale.sweeps.status import summary
from hpcm_scale.training.run import run


def train_in_turn(jobs: Sequence[Job], *, fail_fast: bool = False) -> int:
    """Train the jobs one after the other, also after a failure unless `fail_fast`; returns the exit code.

    Raises SystemExit if a stop is requested, and UserError, before the first job starts, for everything that a job
    would be refused for. With several processes, an error that is not raised by all of them is raised at once, since
    they could not continue together.
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
            failures[job.folder] = _report(job, error)
            if fail_fast:
                break
            continue
        stopped = asked and not (done and job is left[-1])
        if stopped:
            break
    code = summary(jobs, left, failures) if is_first_process() else 0
    code = 1 if failures else STOPPED if stopped else code
    if stopped:
        raise SystemExit(code)
    return code


def _report(job: Job, error: Exception) -> str:
    """Print an error of a job; returns it in one line."""
    if not isinstance(error, UserError):
        traceback.print_exception(error, file=sys.stderr)
    line = " ".join(str(error).split()) or type(error).__name__
    if is_first_process():
        sys.stderr.write(f"hpcm: {job.folder}: {line}\n")
    return line
