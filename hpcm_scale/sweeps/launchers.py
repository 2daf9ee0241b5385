"""Hydra's launchers of sweeps, `hydra/launcher=deepspeed` and `=slurm`, and its sweeper `hydra/sweeper=grids`.

train.py imports this module before Hydra starts, which registers the plugins; heavy imports wait until one is used.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, flag_override

from hpcm_scale.config.compose import typed
from hpcm_scale.config.sweeps import sweeper_grids, swept_keys
from hpcm_scale.errors import UserError
from hpcm_scale.files import write_text, writing
from hpcm_scale.limits import PROCESSES, Range, check_numbers, number
from hpcm_scale.model.ladder import with_size

if TYPE_CHECKING:
    from hpcm_scale.sweeps.jobs import Job

PLUGIN_MODULE = "hydra_plugins.hpcm_scale"
"""Second name of this module: Hydra accepts plugins only from modules below `hydra_plugins`."""
# Not imported: Hydra executes the modules of its plugins again, so that imported classes would not be its own.
_BasicSweeper = cast(
    Any, Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_sweeper.BasicSweeper"]
)
_GRACE = Range(least=0, most=65_535)
"""Seconds, within the range of Slurm."""


@dataclass
class DeepSpeedOptions:
    """`hydra.launcher.…` of the launcher `deepspeed`: concurrent runs on this node."""

    _target_: str = f"{PLUGIN_MODULE}.DeepSpeedLauncher"
    gpus_per_job: int = number(1, PROCESSES)
    """GPUs of each run; on a node without GPUs, processes of each run."""
    gpus: list[int] | None = number(None, Range(least=0, most=1023))
    """Indices of the GPUs to use; default: those in CUDA_VISIBLE_DEVICES, or all."""
    jobs_at_once: int | None = number(None, PROCESSES)
    """Concurrent runs; default: as many as fit on the GPUs, or else on the processor cores."""
    grace: float = number(600.0, _GRACE)
    """Seconds for the checkpoint of a run that is stopped; then it is killed."""


@dataclass
class SlurmOptions:
    """`hydra.launcher.…` of the launcher `slurm`: one batch job per run."""

    _target_: str = f"{PLUGIN_MODULE}.SlurmLauncher"
    nodes: int = number(1, Range(least=1, most=100_000))
    """Nodes of each run."""
    gpus_per_node: int = number(8, Range(least=0, most=1024))
    """GPUs and processes of each run on each node; 0: one process without a GPU."""
    cpus_per_task: int = number(8, Range(least=1, most=1024))
    """Processor cores of each process."""
    time: str = "24:00:00"
    """Time limit of a job, in Slurm's format; an unfinished run is requeued."""
    grace: int = number(600, _GRACE)
    """Seconds before the time limit at which the run writes its checkpoint."""
    partition: str | None = None
    account: str | None = None
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as ['--qos=long','--exclude=node7']."""
    setup: list[str] = field(default_factory=list)
    """Shell commands before training, such as ['module load cuda']."""
    submit: bool = True
    """False: write the scripts only."""


class _JobsLauncher(Launcher):
    """A launcher that turns Hydra's overrides into jobs."""

    options: DeepSpeedOptions | SlurmOptions

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self._context, self._config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by Hydra with the overrides of each job. Raises SystemExit unless all jobs succeed, and UserError
        before anything is started."""
        if "RANK" in os.environ:
            raise UserError(
                "launcher-inside-launcher",
                "hydra/launcher",
                "hydra/launcher starts the processes itself; run `python -m hpcm_scale.train -m …` without deepspeed",
            )
        check_numbers(self.options, "hydra.launcher.")
        from hpcm_scale.sweeps.jobs import make_job

        hydra = self._config.hydra
        swept = swept_keys(list(hydra.overrides.task), sweeper_grids(hydra.sweeper))
        load = self._context.config_loader.load_sweep_config
        jobs = []
        for overrides in job_overrides:
            composed = load(self._config, list(overrides))
            with flag_override(composed, ["struct", "readonly"], False):
                del composed["hydra"]
            jobs.append(make_job(typed(with_size(composed)), list(overrides), swept))
        code = self.train(jobs)
        if code:
            raise SystemExit(code)
        return [JobReturn(status=JobStatus.COMPLETED) for _ in jobs]

    @abstractmethod
    def train(self, jobs: Sequence[Job]) -> int:
        """Train or submit the jobs; returns the exit code."""


class DeepSpeedLauncher(_JobsLauncher):
    """Concurrent runs on this node, each started by `deepspeed`."""

    __module__ = PLUGIN_MODULE
    options: DeepSpeedOptions

    def __init__(self, **options: Any) -> None:
        self.options = DeepSpeedOptions(**options)

    def train(self, jobs: Sequence[Job]) -> int:
        """Train the jobs and print a table; returns the exit code."""
        from hpcm_scale.data.processes import available_cores
        from hpcm_scale.sweeps.jobs import unfinished, write_plans
        from hpcm_scale.sweeps.local import AtOnce, shares, visible_gpus
        from hpcm_scale.sweeps.status import summary

        options = self.options
        gpus = visible_gpus() if options.gpus is None else list(options.gpus)
        cores = available_cores()
        parts = shares(gpus, options.gpus_per_job, options.jobs_at_once, cores)
        left = unfinished(jobs, options.gpus_per_job)
        write_plans(jobs)
        signal = AtOnce(left, parts[: max(1, len(left))], cores, options.grace).train()
        code = summary(jobs, left)
        return code if signal is None else 128 + signal


class SlurmLauncher(_JobsLauncher):
    """One Slurm job per run."""

    __module__ = PLUGIN_MODULE
    options: SlurmOptions

    def __init__(self, **options: Any) -> None:
        self.options = SlurmOptions(**options)

    def train(self, jobs: Sequence[Job]) -> int:
        """Write and submit the scripts; returns the exit code."""
        submit(jobs, self.options)
        return 0


class GridSweeper(_BasicSweeper):
    """The distinct runs of several grids (conf/hydra/sweeper/grids.yaml)."""

    __module__ = PLUGIN_MODULE

    def __init__(self, grids: Sequence[dict[str, Any]], max_batch_size: int | None = None, params: Any = None) -> None:
        super().__init__(max_batch_size, params)
        self._grids = grids

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Batches of the jobs' overrides; values on the command line replace those of a grid."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        jobs: dict[tuple[str, ...], None] = {}
        for grid in self._grids or [{}]:
            whole = parser.parse_overrides([f"{key}={values}" for key, values in grid.items()]) + overrides
            [batch] = super().split_arguments(whole, None)
            jobs.update(dict.fromkeys(map(tuple, batch)))
        return list(super().split_overrides_to_chunks([list(job) for job in jobs], max_batch_size))


def _register() -> None:
    name, _, last = PLUGIN_MODULE.rpartition(".")
    try:
        parent = import_module(name)
    except ImportError:  # no plugin is installed
        parent = sys.modules[name] = ModuleType(name)
        parent.__path__ = []
    sys.modules[PLUGIN_MODULE] = sys.modules[__name__]
    setattr(parent, last, sys.modules[__name__])
    for plugin in (DeepSpeedLauncher, SlurmLauncher, GridSweeper):
        Plugins.instance().register(plugin)
    store = ConfigStore.instance().store
    store(group="hydra/launcher", name="deepspeed", node=DeepSpeedOptions, provider="hpcm_scale")
    store(group="hydra/launcher", name="slurm", node=SlurmOptions, provider="hpcm_scale")


_register()


# Slurm: one batch job per run.


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
    from hpcm_scale.sweeps.jobs import MARK

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
    from hpcm_scale.sweeps.jobs import unfinished, write_plans

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
    from hpcm_scale.sweeps.jobs import MARK

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
