"""sweep.json beside the runs of a sweep: what belongs to it, also before it has begun."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcm_scale.config.compose import to_dict
from hpcm_scale.errors import UserError
from hpcm_scale.files import write_text, writing
from hpcm_scale.scaling.facts import parameters_by_part

if TYPE_CHECKING:
    from hpcm_scale.sweeps.jobs import Job

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
