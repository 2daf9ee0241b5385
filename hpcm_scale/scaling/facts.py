"""What a run's configuration and journal tell about its model, its learning rate and its trunk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import PurePath
from typing import Any

import numpy as np

from hpcm_scale.scaling.runs import Run
from hpcm_scale.streams import shown

ANNEALED = 0.1
"""A learning rate of at most this part of its peak, once past it, counts as decayed."""


def parameters_by_part(config: dict[str, Any]) -> dict[str, int]:
    """Parameters of g_a, g_s, hyper and context of the model that a run's configuration describes.

    Raises UserError if it describes none that this version knows.
    """
    model = {key: value for key, value in config["model"].items() if key != "name"}
    return dict(_parameters_by_part(json.dumps(model, sort_keys=True)))


@cache
def _parameters_by_part(model: str) -> dict[str, int]:
    from hpcm_scale.config.compose import model_from_dict
    from hpcm_scale.model import shapes

    return shapes.parameters_by_part(shapes.on_meta(model_from_dict(json.loads(model))))


def training_pixels(config: dict[str, Any], steps: np.ndarray, images: np.ndarray) -> np.ndarray | None:
    """float64 (n,): pixels trained on after `steps` with so many `images`; None where no crop is told.

    Where crops change on the way, it is the pixels of a step that stay the same (`config.phases`).
    """
    crop = (config.get("data") or {}).get("crop")
    if not crop:
        return None
    changing = (config.get("schedule") or {}).get("crops")
    return steps * config["train"]["batch_size"] * crop**2 if changing else images * crop**2


def learning_rates(run: Run, steps: np.ndarray) -> np.ndarray:
    """float64 (n,): the rate of the last training line at or before each step; NaN before the first one."""
    rows = run.records.rows("train/learning_rate")
    known, rates = (run.records.column(key)[rows] for key in ("step", "train/learning_rate"))
    return np.append(rates, np.nan)[np.searchsorted(known, steps, side="right") - 1]


def annealed(config: dict[str, Any], steps: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """bool (n,): whether the learning rate has decayed to ANNEALED of its peak or less, after its warm-up.

    A rate that is not known (NaN) has not, nor has any where the configuration does not tell the peak.
    """
    schedule = config.get("schedule") or {}
    peak = schedule.get("learning_rate", 0) * max(schedule.get("factors") or [1])
    return (rates <= ANNEALED * peak * (1 + 1e-9)) & (steps > schedule.get("warmup", 0))


def trunk(run: Run, runs: Sequence[Run]) -> str | None:
    """The name of the run that this one branches off, None for an ordinary one.

    Runs may have been moved since: among `runs` it is the one in the trunk's folder, or else the one whose
    folder has the same name, the nearest to this run; where there is none, the folder's own name.
    """
    path = (run.config.get("run") or {}).get("branch_of")
    if path is None:
        return None
    candidates = [other for other in runs if PurePath(path).name in (other.folder.name, PurePath(other.name).name)]

    def far(other: Run) -> tuple[bool, int, str]:
        shared = sum(mine == its for mine, its in zip(run.folder.parts, other.folder.parts, strict=False))
        return str(other.folder) != path, -shared, other.name

    return min(candidates, key=far).name if candidates else shown(PurePath(path).name)
