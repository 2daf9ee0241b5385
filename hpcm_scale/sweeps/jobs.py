"""The jobs of a multirun: one configuration each, named, checked all before the first one starts."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from hpcm_scale.config.compose import to_dict
from hpcm_scale.config.schema import Config
from hpcm_scale.config.sweeps import name_run, quoted, sweep_folder
from hpcm_scale.data.index import load_index
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import STOPPED, UserError
from hpcm_scale.files import write_text, writing
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.scaling.filters import parameters_by_part
from hpcm_scale.training.run_folder import RunFolder, run_directory
from hpcm_scale.training.start import origin_folder, prepare

# The log beside a run's folder: what its processes say, and lines of ours on when they started and ended.


MARK = "hpcm sweep: "
"""What every line of ours begins with."""
_MARKS = re.compile(
    rf"^{MARK}(?:(submitted|starting|started)\b(?: on (\S+) as process group (\d+)$)?"
    r"|(ended) with exit code (-?\d+)(, as asked)?$)",
    re.MULTILINE,
)
TAIL = 1 << 16
"""Bytes at the end of a log that are looked at."""


@dataclass(frozen=True)
class Mark:
    """The last line of ours in a log."""

    kind: str
    """submitted, starting, started or ended."""
    code: int = 0
    """What it ended with."""
    asked: bool = False
    """Whether it had been asked to end."""
    group: int | None = None
    """The process group it was started as, where that was on this machine."""

    @property
    def failed(self) -> bool:
        """Whether it ended as it should not have."""
        return self.code not in (0, STOPPED) and not self.asked


def log_of(folder: Path) -> Path:
    """The log of the run in `folder` lies beside it."""
    return folder.with_name(folder.name + ".log")


def starting(command: Sequence[str]) -> str:
    """The line before a run's processes say anything."""
    return f"{MARK}starting {shlex.join(command)}\n"


def started(group: int) -> str:
    """The line for a run whose processes make up a process group of this machine."""
    return f"{MARK}started on {socket.gethostname()} as process group {group}\n"


def ended(code: int, *, asked: bool = False) -> str:
    """The line for the end of all of a run's processes; `code` is negative for a signal."""
    return f"{MARK}ended with exit code {code}{', as asked' if asked else ''}\n"


def tail(path: Path) -> str:
    """The end of a log, empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def last_mark(text: str) -> Mark | None:
    """The last line of ours in a log's text."""
    marks = list(_MARKS.finditer(text))
    if not marks:
        return None
    kind, host, group, end, code, asked = marks[-1].groups()
    here = host == socket.gethostname()
    return Mark(end or kind, int(code or 0), bool(asked), int(group) if here else None)


def last_error(text: str) -> str:
    """Why the processes whose log is `text` failed, in one line, as far as their last start tells."""
    text = re.split(rf"^{MARK}start(?:ing|ed in)", text, flags=re.MULTILINE)[-1]
    for pattern in (r"^hpcm: (.+)$", r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)$"):
        found = re.findall(pattern, text, re.MULTILINE)
        if found:
            return found[-1].strip()
    code = re.findall(r"exits with return code = (-?\d+)", text) or re.findall(r"exit code (-?\d+)$", text.strip())
    return _in_words(int(code[-1])) if code else "it ended without a word"


def _in_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"a process was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"a process was ended by signal {-code}"


def group_members(group: int) -> list[psutil.Process]:
    """The living processes of a process group of this machine."""
    return [process for process in psutil.process_iter() if _in_group(process, group)]


def _in_group(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False  # it has ended by now


def lives(mark: Mark | None) -> bool:
    """Whether processes that a log's last mark tells of still run on this machine."""
    return mark is not None and mark.group is not None and any(map(_trains, group_members(mark.group)))


def _trains(process: psutil.Process) -> bool:
    """Not another program, which got the number of a group that is no more."""
    try:
        return any("hpcm_scale" in argument for argument in process.cmdline())
    except psutil.Error:
        return False


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


# sweep.json beside the runs of a sweep: what belongs to it, also before it has begun.


FILE_NAME = "sweep.json"


@dataclass(frozen=True)
class Planned:
    """A run as its configuration describes it."""

    model: str
    parameters: int | None
    """None: the configuration is of another version and describes no model of this one."""
    lmbda: float
    steps: int
    overrides: tuple[str, ...] = ()
    """What gives this run by itself, on the command line of `hpcm train`; empty for a branch."""


def planned(config: dict[str, Any], overrides: Sequence[str] = ()) -> Planned:
    """What a run's configuration says. Raises KeyError, TypeError or ValueError for what is no run's."""
    model, lmbda, steps = config["model"]["name"], config["objective"]["lmbda"], config["train"]["steps"]
    return Planned(str(model), _parameters(config), float(lmbda), int(steps), tuple(overrides))


def plan_of(job: Job) -> Planned:
    """What is planned for a job."""
    return planned(to_dict(job.config), job.overrides)


def write_plans(jobs: Sequence[Job]) -> None:
    """Add the jobs to the `sweep.json` of the folders that hold their run folders."""
    for parent in dict.fromkeys(job.folder.parent for job in jobs):
        mine = [job for job in jobs if job.folder.parent == parent]
        runs = {name: asdict(plan) for name, plan in read_plan(parent).items()}
        runs |= {job.name: asdict(plan_of(job)) for job in mine}
        with writing(parent / FILE_NAME):
            write_text(parent / FILE_NAME, json.dumps({"runs": runs}, indent=1))


def read_plan(folder: Path) -> dict[str, Planned]:
    """The runs that belong to the sweep in `folder`, by name; empty where there is no plan."""
    try:
        runs = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))["runs"]
        return {name: Planned(**{**plan, "overrides": tuple(plan["overrides"])}) for name, plan in runs.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / FILE_NAME} is damaged; remove it, the sweep's command writes it again") from error


def _parameters(config: dict[str, Any]) -> int | None:
    try:
        return sum(parameters_by_part(config).values())
    except UserError:
        return None
