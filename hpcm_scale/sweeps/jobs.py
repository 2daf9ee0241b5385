"""The jobs of a multirun: one configuration each, named, checked all before the first one starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hpcm_scale.config.schema import Config
from hpcm_scale.config.sweeps import name_run, quoted, sweep_folder
from hpcm_scale.data.image_set import ImageSet
from hpcm_scale.data.index import load_index
from hpcm_scale.errors import UserError
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.sweeps.log import log_of
from hpcm_scale.training.run_folder import RunFolder, run_directory
from hpcm_scale.training.start import origin_folder, prepare


@dataclass(frozen=True)
class Job:
    """One run of a multirun."""

    config: Config
    overrides: tuple[str, ...]
    """The command line of `hpcm train` that gives this configuration by itself; empty for a branch, which has none."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return run_directory(self.config)

    @property
    def name(self) -> str:
        """What the run is called among the others."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """Where its processes write what they have to say."""
        return log_of(self.folder)

    @property
    def last_step(self) -> int:
        """The step it is to be trained to."""
        return self.config.train.stop_after or self.config.train.steps

    @property
    def reached(self) -> int:
        """The step of its newest checkpoint; a journal need not have a line of that step."""
        return RunFolder(self.folder).checkpoints.reached()


def make_job(config: Config, overrides: Sequence[str], swept: Sequence[str]) -> Job:
    """Name a job that Hydra has composed from `overrides`; `swept` are the keys that the multirun varies."""
    name_run(config, overrides, swept)
    kept = [override for override in overrides if override.split("=")[0] not in ("run.dir", "run.sweep")]
    kept += [f"run.{key}={quoted(value)}" for key, value in _named(config).items() if value is not None]
    return Job(config, (*kept, "hydra.mode=RUN"))  # an experiment may ask for a multirun: this is one of its jobs


def _named(config: Config) -> dict[str, str | None]:
    return {"dir": config.run.dir, "sweep": config.run.sweep}


def unfinished(jobs: Sequence[Job], world_size: int, *, in_turn: bool = False) -> list[Job]:
    """Those of the jobs that have not been trained to their end.

    Where they are trained `in_turn`, one may start from the weights of another before it. Raises UserError for what any
    of them would be refused for when its `world_size` processes start: nothing has been started or written by then.
    """
    taken: dict[Path, Job] = {}
    for job in jobs:
        other = taken.setdefault(job.folder.absolute(), job)
        if other is not job:
            raise UserError(_clash(job, other))
    once = {"open_index": cache(load_index), "open_images": cache(ImageSet), "open_receiver": cache(receiver)}
    left: list[Job] = []
    for job in jobs:
        to_come = [other.folder.resolve() for other in left]
        try:
            if not in_turn and origin_folder(job.config) in to_come:
                raise UserError(
                    f"it starts from init_from={job.config.init_from}, which this command has yet to train; leave "
                    "hydra/launcher out, so that one run follows the other"
                )
            start = prepare(job.config, world_size, **once, to_come=to_come)
        except UserError as error:
            raise UserError(_of(job, str(error))) from error
        stopped = job.last_step <= start.resume.step < job.config.train.steps  # where train.stop_after asked for it
        if not (start.finished or stopped):
            left.append(job)
    return left


def _clash(job: Job, other: Job) -> str:
    if job.config == other.config:
        return f"the sweep trains {job.folder} twice; give each value once"
    return (
        f"two runs of the sweep share run.dir={job.folder}; leave run.dir out (run.sweep=NAME puts the runs into "
        "runs/NAME), or name in it the keys that differ, as in 'run.dir=runs/x/${model.name}_${train.seed}'"
    )


def _of(job: Job, refusal: str) -> str:
    """A refusal of a job, with the job's folder, and with the way out where a sweep has chosen that folder."""
    if str(job.folder) not in refusal:
        refusal = f"{job.folder}: {refusal}"
    named = job.overrides and job.config.run.sweep and job.folder.parent == sweep_folder(job.config.run.sweep)
    if named and "another run.dir" in refusal:
        refusal += "; run.sweep=NAME puts the runs of this sweep into runs/NAME"
    return refusal
