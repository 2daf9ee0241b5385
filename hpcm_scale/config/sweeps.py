"""Multiruns: options of their launchers, overrides and names of their runs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser

from hpcm_scale.config.schema import RunConfig
from hpcm_scale.errors import UserError
from hpcm_scale.limits import PROCESSES, Range, number

LONGEST_NAME = 200
"""Bytes of a generated name. File systems allow 255; the names of the files beside a run folder are longer."""
PLUGIN_MODULE = "hydra_plugins.hpcm_scale"
"""Module of the launchers and the sweeper in their names: Hydra accepts plugins only from below `hydra_plugins`."""
_GRACE = Range(least=0, most=65_535)
"""Seconds, within the range of Slurm."""
_HYDRA_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")


@dataclass
class InTurnOptions:
    """`hydra.launcher.…` of `hydra/launcher=in_turn`, the default: one run after the other in this process."""

    _target_: str = f"{PLUGIN_MODULE}.InTurnLauncher"
    fail_fast: bool = False
    """Whether a failed run ends the sweep."""


@dataclass
class DeepSpeedOptions:
    """`hydra.launcher.…` of `hydra/launcher=deepspeed`: concurrent runs on this node."""

    _target_: str = f"{PLUGIN_MODULE}.DeepSpeedLauncher"
    gpus_per_job: int = number(1, PROCESSES)
    """GPUs of each run; on a node without GPUs, processes of each run."""
    gpus: list[int] | None = number(None, Range(least=0, most=1023))
    """Indices of the GPUs to use; default: those in CUDA_VISIBLE_DEVICES, or all."""
    jobs_at_once: int | None = number(None, PROCESSES)
    """Concurrent runs; default: as many as fit on the GPUs, or else on the processor cores."""
    grace: float = number(600.0, _GRACE)
    """Seconds for the checkpoint of a run that is stopped; then it is killed."""
    fail_fast: bool = False
    """Whether a failed run ends the sweep: running ones are stopped with a checkpoint."""


@dataclass
class SlurmOptions:
    """`hydra.launcher.…` of `hydra/launcher=slurm`: one batch job per run."""

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


LAUNCHERS = {"in_turn": InTurnOptions, "deepspeed": DeepSpeedOptions, "slurm": SlurmOptions}
"""Options by the value of hydra/launcher."""


def job_overrides(
    sweeper: Mapping[str, Any], task: Sequence[str], loader: ConfigLoader | None = None
) -> list[list[list[str]]]:
    """The overrides of each run of a multirun, in batches of `hydra.sweeper.max_batch_size` runs.

    They are the combinations of the values in the command line `task`, or of these with each of the sweeper's grids,
    whose values they replace (conf/hydra/sweeper/grids.yaml); a run that is in two grids comes once.
    """
    parser = OverridesParser.create(config_loader=loader)
    jobs: list[list[str]] = []
    for grid in sweeper.get("grids") or [{}]:
        values = {**grid, **(sweeper.get("params") or {})}
        whole = [*(f"{key}={value}" for key, value in values.items()), *task]
        jobs += BasicSweeper.split_arguments(parser.parse_overrides(whole), None)[0]
    if sweeper.get("grids"):
        jobs = [*map(list, dict.fromkeys(map(tuple, jobs)))]
    return [*BasicSweeper.split_overrides_to_chunks(jobs, sweeper.get("max_batch_size"))]


def name_run(run: RunConfig, job: Sequence[str], swept: Sequence[str]) -> None:
    """Set `run.sweep` and `run.dir` of a job of a multirun, unless the user set them.

    `job` are the overrides of this job, `swept` the keys that differ between jobs (`swept_keys`). The sweep is named
    after these keys, the run after their values: runs/sweep_model/model=nano. A name that is no valid file name, for
    its slashes or its length, is changed into one and gets a hash, so that different names stay different.
    """
    if not swept:
        return  # a single job is a run like any other
    run.sweep = run.sweep or sweep_name(swept)
    chosen = [override for override in job if override.split("=")[0].lstrip("+") in swept]
    if run.dir is None:
        run.dir = str(sweep_folder(run.sweep) / _file_name(",".join(chosen)))


def sweep_name(swept: Sequence[str]) -> str:
    """The default `run.sweep` of a sweep over these keys."""
    return _file_name("sweep_" + "_".join(key.replace("/", ".") for key in swept))


def sweep_folder(sweep: str) -> Path:
    """The folder that holds the runs of a sweep."""
    return Path("runs") / sweep


def _file_name(text: str) -> str:
    name = text.replace("/", "_")
    if name == text and len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    mark = "-" + sha256(os.fsencode(text)).hexdigest()[:8]
    return os.fsencode(name)[: LONGEST_NAME - len(mark)].decode(errors="ignore") + mark


def swept_keys(sweeper: Mapping[str, Any], task: Sequence[str]) -> list[str]:
    """The keys that differ between the jobs of a multirun.

    They are the keys of `hydra.sweeper`'s params and grids, and those with several values in the command line `task`. A
    key of a grid counts even if the command line gives it a single value: a run has the same folder whether it is
    trained with the others or separately.
    """
    grids = [sweeper.get("params") or {}, *(sweeper.get("grids") or [])]
    parsed = OverridesParser.create().parse_overrides(list(task))
    keys = [
        *(key for grid in grids for key in grid),
        *(each.key_or_group for each in parsed if each.is_sweep_override()),
    ]
    return list(dict.fromkeys(keys))


def refuse_hydra_folders(overrides: Sequence[str]) -> None:
    """Raise UserError for Hydra's own keys of folders, which have no effect here."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group in _HYDRA_FOLDERS:
            raise UserError(
                "hydra-folder",
                override.key_or_group,
                f"{override.input_line} has no effect; set run.dir=DIR, the run folder, or run.sweep=NAME, which "
                "writes the runs of a sweep to runs/NAME",
            )


def quoted(value: str) -> str:
    """A text as Hydra's grammar parses it, with any characters."""
    value = re.sub(r'(\\*)"', r'\1\1\\"', value)
    value = re.sub(r"(\\+)$", r"\1\1", value)
    return '"' + value.replace("${", r"\${") + '"'
