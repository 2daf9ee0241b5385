"""The jobs of a multirun, which are all checked before the first one starts; their logs; sweep.json."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from hpcm_scale.config.compose import to_dict
from hpcm_scale.config.schema import Config
from hpcm_scale.config.spec import run_directory
from hpcm_scale.config.sweeps import name_run, quoted, sweep_folder
from hpcm_scale.data.index import load_index
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import STOPPED, UserError
from hpcm_scale.files import write_text, writing
from hpcm_scale.scaling.filters import parameters_of
from hpcm_scale.tasks import receiver
from hpcm_scale.training.run_folder import RunFolder
from hpcm_scale.training.start import origin_folder, prepare

# The log beside a run folder: output of the run's processes, and marks of their start and end.


MARK = "hpcm sweep: "
"""Prefix of a mark."""
_MARKS = re.compile(
    rf"^{MARK}(?:(submitted|starting|started)\b(?: on (\S+) as process group (\d+)$)?"
    r"|(ended) with exit code (-?\d+)(, as asked)?$)",
    re.MULTILINE,
)
TAIL = 1 << 16
"""Bytes at the end of a log that are read."""


@dataclass(frozen=True)
class Mark:
    """The last mark in a log."""

    kind: str
    """submitted, starting, started or ended."""
    code: int = 0
    """Exit code."""
    asked: bool = False
    """Whether the launcher had stopped it."""
    group: int | None = None
    """Its process group, if it was started on this node."""

    @property
    def failed(self) -> bool:
        """Whether it exited with an error of its own."""
        return self.code not in (0, STOPPED) and not self.asked


def log_of(folder: Path) -> Path:
    """The log of the run in `folder`, beside that folder."""
    return folder.with_name(folder.name + ".log")


def starting(command: Sequence[str]) -> str:
    """The mark before a run's processes start."""
    return f"{MARK}starting {shlex.join(command)}\n"


def started(group: int) -> str:
    """The mark of a run whose processes are a process group of this node."""
    return f"{MARK}started on {socket.gethostname()} as process group {group}\n"


def ended(code: int, *, asked: bool = False) -> str:
    """The mark of the end of all processes of a run; `code` is negative for a signal."""
    return f"{MARK}ended with exit code {code}{', as asked' if asked else ''}\n"


def tail(path: Path) -> str:
    """The end of a log; empty without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def last_mark(text: str) -> Mark | None:
    """The last mark in the text of a log."""
    marks = list(_MARKS.finditer(text))
    if not marks:
        return None
    kind, host, group, end, code, asked = marks[-1].groups()
    here = host == socket.gethostname()
    return Mark(end or kind, int(code or 0), bool(asked), int(group) if here else None)


def last_error(text: str) -> str:
    """The error in the log `text` since the last start, in one line."""
    text = re.split(rf"^{MARK}start(?:ing|ed in)", text, flags=re.MULTILINE)[-1]
    for pattern in (r"^hpcm: (.+)$", r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)$"):
        found = re.findall(pattern, text, re.MULTILINE)
        if found:
            return found[-1].strip()
    code = re.findall(r"exits with return code = (-?\d+)", text) or re.findall(r"exit code (-?\d+)$", text.strip())
    return _described(int(code[-1])) if code else "it ended without an error message"


def _described(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"a process was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"a process was killed by signal {-code}"


def group_members(group: int) -> list[psutil.Process]:
    """The living processes of a process group of this node."""
    members = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):  # it has ended meanwhile
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def arguments_of(process: psutil.Process) -> list[str]:
    """The command line of a process; empty if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def lives(mark: Mark | None) -> bool:
    """Whether processes of a log's last mark still run on this node."""
    if mark is None or mark.group is None:
        return False
    # Only those of this package: the number of an ended group may be in use by another program.
    return any("hpcm_scale" in argument for process in group_members(mark.group) for argument in arguments_of(process))


@dataclass(frozen=True)
class Job:
    """One run of a multirun."""

    config: Config
    overrides: tuple[str, ...]
    """Overrides of `hpcm train` for this run only; empty for a cooldown, which has none."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return run_directory(self.config.run, self.config.model.name)

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """Log of its processes."""
        return log_of(self.folder)

    @property
    def plan(self) -> Planned:
        """Its entry in sweep.json."""
        return planned(to_dict(self.config), self.overrides)

    @property
    def last_step(self) -> int:
        """The step at which training ends: train.stop_after or train.steps."""
        return self.config.train.stop_after or self.config.train.steps

    @property
    def reached(self) -> int:
        """Step of its newest checkpoint, which may be later than the last journal line."""
        return RunFolder(self.folder).checkpoints.reached()


def make_job(config: Config, overrides: Sequence[str], swept: Sequence[str]) -> Job:
    """A named job of the configuration that Hydra composed from `overrides`; `swept` are the keys that vary."""
    name_run(config.run, overrides, swept)
    kept = [override for override in overrides if override.split("=")[0] not in ("run.dir", "run.sweep")]
    named = {"dir": config.run.dir, "sweep": config.run.sweep}
    kept += [f"run.{key}={quoted(value)}" for key, value in named.items() if value is not None]
    return Job(config, (*kept, "hydra.mode=RUN"))  # overrides the multirun mode of an experiment


def unfinished(jobs: Sequence[Job], world_size: int, *, in_turn: bool = False) -> list[Job]:
    """The jobs that have training left.

    With `in_turn`, a job may start from the weights of an earlier one. Raises UserError for everything that a job would
    be refused for at the start of its `world_size` processes; nothing has been started or written by then.
    """
    taken: dict[Path, Job] = {}
    for job in jobs:
        other = taken.setdefault(job.folder.absolute(), job)
        if other is job:
            continue
        if job.config == other.config:
            raise UserError(
                "duplicate-job", "run.dir", f"the sweep trains {job.folder} twice; give each value only once"
            )
        raise UserError(
            "shared-run-dir",
            "run.dir",
            f"two runs of the sweep share run.dir={job.folder}; omit run.dir (run.sweep=NAME puts the runs into "
            "runs/NAME), or use the keys that differ in it, as in 'run.dir=runs/x/${model.name}_${train.seed}'",
        )
    once = {"open_index": cache(load_index), "open_images": cache(ImageSet), "open_receiver": cache(receiver)}
    left: list[Job] = []
    for job in jobs:
        to_come = [other.folder.resolve() for other in left]
        try:
            if not in_turn and origin_folder(job.config.init_from) in to_come:
                raise UserError(
                    "init-from-unfinished-job",
                    "init_from",
                    f"the run starts from init_from={job.config.init_from}, which this command also trains; omit "
                    "hydra/launcher to train the runs in sequence",
                )
            start = prepare(job.config, world_size, **once, to_come=to_come)
        except UserError as error:
            raise UserError(error.code, error.key, _with_folder(job, str(error))) from error
        stopped = job.last_step <= start.resume.step < job.config.train.steps  # at train.stop_after
        if not (start.finished or stopped):
            left.append(job)
    return left


def _with_folder(job: Job, sentence: str) -> str:
    """The sentence of a UserError with the job's folder and, if the sweep chose that folder, with another remedy."""
    if str(job.folder) not in sentence:
        sentence = f"{job.folder}: {sentence}"
    named = job.overrides and job.config.run.sweep and job.folder.parent == sweep_folder(job.config.run.sweep)
    if named and "another run.dir" in sentence:
        sentence += "; run.sweep=NAME puts the runs of this sweep into runs/NAME"
    return sentence


# sweep.json beside the runs of a sweep lists them, also those that have not started.


FILE_NAME = "sweep.json"


@dataclass(frozen=True)
class Planned:
    """A run according to its configuration."""

    model: str
    parameters: int | None
    """None if this version cannot build the model."""
    lmbda: float
    steps: int
    overrides: tuple[str, ...] = ()
    """`Job.overrides`."""


def planned(config: Any, overrides: Sequence[str] = ()) -> Planned:
    """The plan of a run. Raises KeyError, TypeError or ValueError if `config` is not that of a run."""
    model, lmbda, steps = config["model"]["name"], config["objective"]["lmbda"], config["train"]["steps"]
    try:
        parameters = parameters_of(config)
    except UserError:
        parameters = None
    return Planned(str(model), parameters, float(lmbda), int(steps), tuple(overrides))


def write_plans(jobs: Sequence[Job]) -> None:
    """Add the jobs to sweep.json in the parents of their run folders."""
    for parent in dict.fromkeys(job.folder.parent for job in jobs):
        mine = [job for job in jobs if job.folder.parent == parent]
        runs = {name: asdict(plan) for name, plan in read_plan(parent).items()}
        runs |= {job.name: asdict(job.plan) for job in mine}
        with writing(parent / FILE_NAME):
            write_text(parent / FILE_NAME, json.dumps({"runs": runs}, indent=1))


def read_plan(folder: Path) -> dict[str, Planned]:
    """The runs of sweep.json in `folder` by name; empty without the file. Raises UserError if it is malformed."""
    try:
        runs = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))["runs"]
        return {name: Planned(**{**plan, "overrides": tuple(plan["overrides"])}) for name, plan in runs.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "malformed-sweep-json",
            FILE_NAME,
            f"{folder / FILE_NAME} is malformed; remove it and run the sweep's command again, which rewrites it",
        ) from error
