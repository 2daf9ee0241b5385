"""Runs of a sweep under Slurm: one batch job per run.

hydra-submitit-launcher is not used: its jobs are pickled functions for whose results the command waits, while this
module submits scripts that requeue themselves and can be edited, and exits.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hpcm_scale.config.sweeps import SlurmOptions
from hpcm_scale.errors import UserError
from hpcm_scale.files import write_text, writing
from hpcm_scale.sweeps.jobs import MARK, Job, unfinished, write_plans

_BODY = r"""
# Before its time limit or when preempted, the run writes a checkpoint and is requeued; the next start resumes it.
set -euo pipefail
cd -- @FOLDER@
echo "@MARK@started in Slurm job $SLURM_JOB_ID"
trap 'echo "@MARK@ended with exit code $?"' EXIT
@SETUP@

@UNDER_SLURM@
under_slurm @PYTHON@ -m hpcm_scale.train @OVERRIDES@
"""


def script(job: Job, options: SlurmOptions) -> str:
    """The batch script of a job: options of sbatch, then the training command."""
    parts = {
        "FOLDER": shlex.quote(str(Path.cwd())),
        "MARK": MARK,
        "SETUP": "\n".join(options.setup),
        "PYTHON": shlex.quote(sys.executable),
        "OVERRIDES": " ".join(map(shlex.quote, job.overrides)),
        "UNDER_SLURM": Path(__file__).with_name("slurm_job.sh").read_text(encoding="utf-8"),
    }
    body = _BODY
    for name, value in parts.items():
        body = body.replace(f"@{name}@", value)
    return "\n".join(["#!/usr/bin/env bash", *(f"#SBATCH {line}" for line in _header(job, options))]) + body


def _header(job: Job, options: SlurmOptions) -> list[str]:
    lines = [
        f"--job-name={_job_name(job)}",
        "--dependency=singleton",  # a second submission waits for the first
        f"--nodes={options.nodes}",
        f"--ntasks-per-node={max(1, options.gpus_per_node)}",
        f"--cpus-per-task={options.cpus_per_task}",
        f"--time={options.time}",
        f"--output={shlex.quote(str(job.log.absolute()).replace('%', '%%'))}",
        "--open-mode=append",
        "--requeue",
        f"--signal=USR1@{options.grace}",
    ]
    if options.gpus_per_node:
        lines.append(f"--gpus-per-node={options.gpus_per_node}")
    lines += [f"--{key}={value}" for key in ("partition", "account") if (value := getattr(options, key))]
    return [*lines, *options.options]


def _job_name(job: Job) -> str:
    """A name unique to the run, the same in every submission."""
    digest = hashlib.sha256(os.fsencode(job.folder.absolute())).hexdigest()
    return f"hpcm_{re.sub('[^a-zA-Z0-9.=_-]', '_', job.name)}_{digest[:8]}"


def submit(jobs: Sequence[Job], options: SlurmOptions) -> None:
    """Write the script of each unfinished job beside its run folder, and submit it unless it is in the queue.

    Raises UserError, before anything is submitted, if a job would be refused at its start or sbatch is missing; later
    if sbatch fails.
    """
    left = unfinished(jobs, options.nodes * max(1, options.gpus_per_node))
    if options.submit and shutil.which("sbatch") is None:
        raise UserError(
            "no-sbatch",
            "hydra.launcher.submit",
            "sbatch is not installed on this node; run the command on a node with Slurm, or add "
            "hydra.launcher.submit=false",
        )
    write_plans(jobs)
    for job in jobs:
        if job not in left:
            print(f"{job.folder}: already finished")
            continue
        path = job.folder.with_name(job.name + ".sbatch")
        with writing(path):
            write_text(path, script(job, options))
        queued = _queued(job) if options.submit else None
        if not options.submit:
            print(f"{job.folder}: sbatch {shlex.quote(str(path))}")
        elif queued:
            print(f"{job.folder}: already in the queue as Slurm job {queued}")
        else:
            print(f"{job.folder}: Slurm job {_sbatch(job, path)}, log: {job.log}", flush=True)


def _queued(job: Job) -> str | None:
    """Id of the Slurm job of this run, pending or running; None without one."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--me", "--noheader", "--format=%i", f"--name={_job_name(job)}"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.split()[0] if answer.returncode == 0 and answer.stdout.strip() else None


def _sbatch(job: Job, path: Path) -> str:
    """Submit a script; returns the id of the Slurm job."""
    with job.log.open("a", encoding="utf-8") as log:
        log.write(f"{MARK}submitted to Slurm\n")
    answer = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if answer.returncode:
        reason = " ".join(answer.stderr.split()) or f"exit code {answer.returncode}"
        raise UserError(
            "sbatch-failure",
            "hydra.launcher",
            f"sbatch failed on {path} ({reason}); correct hydra.launcher.… and run the same command again",
        )
    return answer.stdout.split(";")[0].strip()
