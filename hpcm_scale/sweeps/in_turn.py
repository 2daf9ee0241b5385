"""Trains the jobs of a multirun one after the other, in this process and those that were launched with it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from hpcm_scale.errors import UserError, is_first_process
from hpcm_scale.sweeps.jobs import Job, unfinished
from hpcm_scale.sweeps.plan import write_plans
from hpcm_scale.sweeps.summary import summary
from hpcm_scale.training import processes
from hpcm_scale.training.run import run
from hpcm_scale.training.run_folder import RunFolder


def train_in_turn(jobs: Sequence[Job]) -> int:
    """Train all; a job that fails does not keep the others from being trained. Returns the exit code.

    Raises UserError for what any job would be refused for, before the first one starts. Where there are several
    processes, an error that others may not have met ends them all: they could not go on together.
    """
    world_size = processes.world_size()
    left = unfinished(jobs, world_size)
    if is_first_process():
        write_plans(jobs)
    failures: dict[str, str] = {}
    for job in left:
        try:
            run(job.config)
        except Exception as error:
            common = isinstance(error, UserError) and not error.local
            if world_size > 1 and not common:
                raise
            failures[job.name] = _told(job, error)
            continue
        if _reached(job) < job.last_step:
            break  # asked to stop
    skipped = {job.name for job in jobs} - {job.name for job in left}
    code = summary(jobs, skipped, failures) if is_first_process() else 0
    return code


def _reached(job: Job) -> int:
    """The step of the newest checkpoint: the same for every process."""
    newest = RunFolder(job.folder).checkpoints.newest()
    return newest[1]["step"] if newest else 0


def _told(job: Job, error: Exception) -> str:
    """Tell of a failure at once, and give it in a line."""
    if not isinstance(error, UserError):
        traceback.print_exception(error, file=sys.stderr)
    line = " ".join(str(error).split()) or type(error).__name__
    if is_first_process():
        sys.stderr.write(f"hpcm: {job.name}: {line}\n")
    return line
