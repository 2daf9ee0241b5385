"""Plugins of Hydra: the launchers `hydra/launcher=in_turn`, `deepspeed` and `slurm`, the sweeper `hydra/sweeper=grids`.

train.py imports this module before Hydra starts, which registers the plugins; heavy imports wait until one is used.
"""

from __future__ import annotations

import math
import os
import sys
from abc import abstractmethod
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, flag_override

from hpcm_scale.config.compose import typed
from hpcm_scale.config.sweeps import (
    PLUGIN_MODULE,
    DeepSpeedOptions,
    InTurnOptions,
    SlurmOptions,
    job_overrides,
    sweep_folder,
    sweep_name,
    swept_keys,
)
from hpcm_scale.errors import Fault, UserError
from hpcm_scale.limits import check_numbers
from hpcm_scale.model.ladder import with_size

if TYPE_CHECKING:
    from hpcm_scale.sweeps.jobs import Job

_WITHOUT_VALUES = ("basic", "grids")
"""Sweepers that do not use the losses of runs; others are optimizers."""


class _JobsLauncher(Launcher):
    """A launcher that turns Hydra's overrides into jobs."""

    kind: type
    """Of its options."""

    def __init__(self, **options: Any) -> None:
        self.options = self.kind(**options)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra. An optimizer writes its results to the sweep's folder."""
        self._load, self._config, settings = hydra_context.config_loader.load_sweep_config, config, config.hydra
        # Not resolved: interpolations in overrides are those of each run.
        self._swept = swept_keys(settings.sweeper, OmegaConf.to_container(settings.overrides.task))  # type: ignore
        self._sweeper = settings.runtime.choices["hydra/sweeper"]
        self._optimizes = self._sweeper not in _WITHOUT_VALUES
        if self._optimizes:
            with flag_override(config, ["struct", "readonly"], False):
                settings.sweep.dir = str(sweep_folder(config.run.sweep or sweep_name(self._swept)))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by Hydra with the overrides of each job; for an optimizer, returns the final losses.

        The result of a failed run raises `Fault`. Raises SystemExit if the sweep is interrupted or, without an
        optimizer or with fail_fast, a run fails; UserError before anything is started.
        """
        self.check()
        check_numbers(self.options, "hydra.launcher.")
        distinct = dict.fromkeys(map(tuple, job_overrides)) if self._optimizes else [*map(tuple, job_overrides)]
        jobs = [self._job(run, number) for number, run in enumerate(distinct, initial_job_idx)]
        code = self.train(jobs)
        if code and (code != 1 or not self._optimizes or getattr(self.options, "fail_fast", False)):
            raise SystemExit(code)
        if not self._optimizes:
            return [JobReturn(status=JobStatus.COMPLETED) for _ in jobs]
        Path(self._config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        results = dict(zip(distinct, map(_result, jobs), strict=True))  # an optimizer may propose one run twice
        return [results[tuple(run)] for run in job_overrides]

    def _job(self, overrides: Sequence[str], number: int) -> Job:
        from hpcm_scale.sweeps.jobs import make_job

        composed = self._load(self._config, list(overrides))
        with flag_override(composed, ["struct", "readonly"], False):
            composed.hydra.job.num = number
            HydraConfig.instance().set_config(composed)  # for interpolations ${hydra:…}
            del composed["hydra"]
        return make_job(typed(with_size(composed)), overrides, self._swept)

    def check(self) -> None:
        """Raise UserError if the launcher cannot run here, or not with this sweeper."""
        if "RANK" in os.environ:
            raise UserError(
                "launcher-inside-launcher",
                "hydra/launcher",
                "hydra/launcher starts the processes itself; run `python -m hpcm_scale.train -m …` without deepspeed",
            )

    @abstractmethod
    def train(self, jobs: Sequence[Job]) -> int:
        """Train or submit the jobs; returns the exit code. Raises SystemExit if it is interrupted."""


def _result(job: Job) -> JobReturn:
    """The last evaluation loss, or else the smoothed training loss, of a job that has ended; a failure if it has none,
    or has not reached its last step."""
    from hpcm_scale.sweeps.status import Follower

    loss = Follower(job.folder, job.plan).look().loss
    if job.reached >= job.last_step and loss is not None and math.isfinite(loss):
        return JobReturn(job.overrides, status=JobStatus.COMPLETED, _return_value=loss)
    failure = Fault(
        "no-final-loss",
        "hydra/sweeper",
        f"{job.folder} has failed or has no finite loss; correct the cause and run the same command again",
    )
    return JobReturn(job.overrides, status=JobStatus.FAILED, _return_value=failure)


class InTurnLauncher(_JobsLauncher):
    """One run after the other, in this process and those launched with it."""

    __module__, kind = PLUGIN_MODULE, InTurnOptions

    def check(self) -> None:
        """Raise UserError for an optimizer in several processes."""
        if self._optimizes and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "optimizer-in-several-processes",
                "hydra/sweeper",
                f"each process would optimize for itself with hydra/sweeper={self._sweeper}; run "
                "`python -m hpcm_scale.train -m hydra/launcher=deepspeed …` without deepspeed",
            )

    def train(self, jobs: Sequence[Job]) -> int:
        """Train the jobs and print a table; returns the exit code."""
        from hpcm_scale.sweeps.in_turn import train_in_turn

        return train_in_turn(jobs, fail_fast=self.options.fail_fast)


class DeepSpeedLauncher(_JobsLauncher):
    """Concurrent runs on this node, each started by `deepspeed`."""

    __module__, kind = PLUGIN_MODULE, DeepSpeedOptions

    def train(self, jobs: Sequence[Job]) -> int:
        """Train the jobs and print a table; returns the exit code."""
        from hpcm_scale.sweeps.local import train_at_once

        return train_at_once(jobs, self.options)


class SlurmLauncher(_JobsLauncher):
    """One Slurm job per run."""

    __module__, kind = PLUGIN_MODULE, SlurmOptions

    def check(self) -> None:
        """Raise UserError for an optimizer."""
        super().check()
        if self._optimizes:
            raise UserError(
                "optimizer-under-slurm",
                "hydra/launcher",
                f"hydra/sweeper={self._sweeper} needs the losses of runs, which hydra/launcher=slurm only submits; run "
                "the command in a Slurm job with hydra/launcher=deepspeed, or omit hydra/sweeper",
            )

    def train(self, jobs: Sequence[Job]) -> int:
        """Write and submit the scripts; returns the exit code."""
        from hpcm_scale.sweeps.slurm import submit

        submit(jobs, self.options)
        return 0


class GridSweeper(Sweeper):
    """The distinct runs of several grids (conf/hydra/sweeper/grids.yaml)."""

    __module__ = PLUGIN_MODULE

    def __init__(self, **options: Any) -> None:
        self._options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self._loader = hydra_context.config_loader
        self._launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        """Called by Hydra with the overrides of the command line."""
        # In turn, all runs are one batch, since they are checked before the first one starts.
        whole = {"max_batch_size": None} if isinstance(self._launcher, InTurnLauncher) else {}
        number = 0
        for batch in job_overrides(self._options | whole, arguments, self._loader):
            self._launcher.launch(batch, number)
            number += len(batch)


def _register() -> None:
    """Make the plugins known to Hydra, which locates them by a module below `hydra_plugins`."""
    for plugin in (InTurnLauncher, DeepSpeedLauncher, SlurmLauncher, GridSweeper):
        Plugins.instance().register(plugin)
    package, _, name = PLUGIN_MODULE.rpartition(".")
    try:
        parent = import_module(package)
    except ImportError:  # no other plugin is installed
        parent = sys.modules[package] = ModuleType(package)
    setattr(parent, name, sys.modules[__name__])


_register()
