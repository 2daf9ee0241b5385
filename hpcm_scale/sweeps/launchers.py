"""Hydra's launchers of sweeps: on this machine, and as jobs of Slurm."""

from __future__ import annotations

import os
import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

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
from hpcm_scale.limits import PROCESSES, Range, check_numbers, number
from hpcm_scale.model.ladder import sized

if TYPE_CHECKING:
    from hpcm_scale.sweeps.jobs import Job
import hashlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from hpcm_scale.files import write_text, writing
from hpcm_scale.sweeps.jobs import MARK, Job, unfinished, write_plans

# Hydra's plugins: `hydra/launcher=deepspeed`, `hydra/launcher=slurm` and `hydra/sweeper=grids`.
#
# Imported before Hydra starts, this module makes them known; heavy imports wait until one of them is used.


PLUGIN_MODULE = "hydra_plugins.hpcm_scale"
"""Hydra takes plugins only from modules below `hydra_plugins`: this one goes by such a name, too."""
# Not imported: looking for plugins, Hydra runs their modules again, and classes imported before are not its own.
_BasicSweeper = Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_sweeper.BasicSweeper"]
_GRACE = Range(least=0, most=65_535)
"""Seconds, as many as Slurm takes."""


@dataclass
class DeepSpeedOptions:
    """`hydra.launcher.…` of the launcher `deepspeed`: several runs at a time on this machine."""

    _target_: str = f"{PLUGIN_MODULE}.DeepSpeedLauncher"
    gpus_per_job: int = number(1, PROCESSES)
    """GPUs of each run; on a machine without any, its processes."""
    gpus: list[int] | None = number(None, Range(least=0, most=1023))
    """The GPUs to use, by number; unset: all that CUDA_VISIBLE_DEVICES leaves."""
    jobs_at_once: int | None = number(None, PROCESSES)
    """Runs at a time; unset: as many as there are GPUs, or else processor cores, for."""
    grace: float = number(600.0, _GRACE)
    """Seconds that a run has to write its checkpoint when it is asked to stop."""


@dataclass
class SlurmOptions:
    """`hydra.launcher.…` of the launcher `slurm`: one batch job a run."""

    _target_: str = f"{PLUGIN_MODULE}.SlurmLauncher"
    nodes: int = number(1, Range(least=1, most=100_000))
    """Machines of each run."""
    gpus_per_node: int = number(8, Range(least=0, most=1024))
    """GPUs, and processes, of each run on each machine; 0: one process without a GPU."""
    cpus_per_task: int = number(8, Range(least=1, most=1024))
    """Processor cores of each process."""
    time: str = "24:00:00"
    """Longest time before a run goes back into the queue, as Slurm writes it."""
    grace: int = number(600, _GRACE)
    """Seconds before that at which it is asked to write its checkpoint."""
    partition: str | None = None
    account: str | None = None
    options: list[str] = field(default_factory=list)
    """More options of sbatch, such as ['--qos=long','--exclude=node7']."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before training, such as ['module load cuda']."""
    submit: bool = True
    """False: only write the scripts."""


class _JobsLauncher(Launcher):
    """A launcher of whole runs: Hydra's overrides in, jobs out."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self._context, self._config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by Hydra with the overrides of each job. Ends the program with another code than 0 unless all goes
        well; raises UserError before anything is started."""
        if "RANK" in os.environ:
            raise UserError(
                "hydra/launcher starts processes of its own; type `python -m hpcm_scale.train -m …`, without deepspeed"
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
            jobs.append(make_job(typed(composed, sized), list(overrides), swept))
        code = self.train(jobs)
        if code:
            raise SystemExit(code)
        return [JobReturn(status=JobStatus.COMPLETED) for _ in jobs]

    @abstractmethod
    def train(self, jobs: Sequence[Job]) -> int:
        """Train the jobs, or have them trained; returns the exit code."""


class DeepSpeedLauncher(_JobsLauncher):
    """Several runs at a time on this machine, each by a `deepspeed` of its own."""

    __module__ = PLUGIN_MODULE

    def __init__(self, **options: Any) -> None:
        self.options = DeepSpeedOptions(**options)

    def train(self, jobs: Sequence[Job]) -> int:
        """Train the jobs; prints a table at the end."""
        from hpcm_scale.data.processes import available_cores
        from hpcm_scale.sweeps.jobs import unfinished, write_plans
        from hpcm_scale.sweeps.local import AtOnce, shares, visible_gpus
        from hpcm_scale.sweeps.table import summary

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
    """One batch job a run, submitted to Slurm."""

    __module__ = PLUGIN_MODULE

    def __init__(self, **options: Any) -> None:
        self.options = SlurmOptions(**options)

    def train(self, jobs: Sequence[Job]) -> int:
        """Write and submit the scripts."""

        submit(jobs, self.options)
        return 0


class GridSweeper(_BasicSweeper):
    """The runs of several grids (conf/hydra/sweeper/grids.yaml), each run once."""

    __module__ = PLUGIN_MODULE

    def __init__(self, grids: Sequence[dict[str, Any]], max_batch_size: int | None = None, params: Any = None) -> None:
        super().__init__(max_batch_size, params)
        self._grids = grids

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Batches of the jobs' overrides; what the command line says of a key replaces what a grid says."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        jobs: dict[tuple[str, ...], None] = {}
        for grid in self._grids or [{}]:
            whole = parser.parse_overrides([f"{key}={values}" for key, values in grid.items()]) + overrides
            [batch] = super().split_arguments(whole, None)
            jobs.update(dict.fromkeys(map(tuple, batch)))
        return list(super().split_overrides_to_chunks([list(job) for job in jobs], max_batch_size))


def _make_known() -> None:
    name, _, last = PLUGIN_MODULE.rpartition(".")
    try:
        parent = import_module(name)
    except ImportError:  # no other plugin is installed
        parent = sys.modules[name] = ModuleType(name)
        parent.__path__ = []
    sys.modules[PLUGIN_MODULE] = sys.modules[__name__]
    setattr(parent, last, sys.modules[__name__])
    for plugin in (DeepSpeedLauncher, SlurmLauncher, GridSweeper):
        Plugins.instance().register(plugin)
    store = ConfigStore.instance().store
    store(group="hydra/launcher", name="deepspeed", node=DeepSpeedOptions, provider="hpcm_scale")
    store(group="hydra/launcher", name="slurm", node=SlurmOptions, provider="hpcm_scale")


_make_known()


# Trains the jobs of a sweep under Slurm, one batch job a run.


_BODY = r"""
# Preempted, or before its time is up, the run writes a checkpoint, goes back into the queue and goes on from there.
set -euo pipefail
cd -- @FOLDER@
echo "@MARK@started in Slurm job $SLURM_JOB_ID"
trap 'echo "@MARK@ended with exit code $?"' EXIT
@SETUP@

@UNDER_SLURM@
under_slurm @PYTHON@ -m hpcm_scale.train @OVERRIDES@
"""


def world_size(options: SlurmOptions) -> int:
    """Processes of each run."""
    return options.nodes * max(1, options.gpus_per_node)


def script(job: Job, options: SlurmOptions) -> str:
    """The batch script of a job: Slurm's options at its top, to be edited, then the same training as anywhere."""
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
        "--dependency=singleton",  # submitted twice, the second waits for the first and finds its work done
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
    """The same for every submission of a run, and for no other run."""
    digest = hashlib.sha256(os.fsencode(job.folder.absolute())).hexdigest()
    return f"hpcm_{re.sub('[^a-zA-Z0-9.=_-]', '_', job.name)}_{digest[:8]}"


def submit(jobs: Sequence[Job], options: SlurmOptions) -> None:
    """Write the script of each unfinished job beside its run folder, and submit it unless it is in the queue.

    Raises UserError if a job would be refused when it starts, or Slurm cannot be asked; nothing is submitted then.
    """
    left = unfinished(jobs, world_size(options))
    if options.submit and shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch on this machine; type this where Slurm is, or add hydra.launcher.submit=false"
        )
    write_plans(jobs)
    for job in jobs:
        if job not in left:
            print(f"{job.folder}: finished already")
            continue
        path = job.folder.with_name(job.name + ".sbatch")
        with writing(path):
            write_text(path, script(job, options))
        queued = _queued(job) if options.submit else None
        if not options.submit:
            print(f"{job.folder}: sbatch {shlex.quote(str(path))}")
        elif queued:
            print(f"{job.folder}: in the queue already, as Slurm job {queued}")
        else:
            print(f"{job.folder}: Slurm job {_sbatch(job, path)}, log: {job.log}", flush=True)


def _queued(job: Job) -> str | None:
    """The number of the Slurm job that trains this run, or waits to."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--me", "--noheader", "--format=%i", f"--name={_job_name(job)}"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.split()[0] if answer.returncode == 0 and answer.stdout.strip() else None


def _sbatch(job: Job, path: Path) -> str:
    with job.log.open("a", encoding="utf-8") as log:
        log.write(f"{MARK}submitted to Slurm\n")
    answer = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True)
    if answer.returncode:
        said = " ".join(answer.stderr.split()) or f"exit code {answer.returncode}"
        raise UserError(f"sbatch refuses {path} ({said}); mend hydra.launcher.…, and type the same command again")
    return answer.stdout.split(";")[0].strip()
