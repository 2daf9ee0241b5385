"""Results of runs by configuration, as a table and as CSV."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table
from scipy import stats
from yaml import YAMLError

from hpcm_scale.evaluation.tables import csv_text
from hpcm_scale.files import write_text, writing
from hpcm_scale.formatting import DASH, count, significant, terminal_table, with_error
from hpcm_scale.scaling.runs import CONFIG_NAME
from hpcm_scale.sweeps.status import MEASURES, RunState

LEVEL = 0.95
"""Probability of the intervals."""
_SEED = re.compile(r",?(?:train\.)?seed=-?\d+")
_PLACES = {"run": ("dir", "sweep", "cooldown_of"), "train": ("seed",)}
"""Keys of a configuration in which the seeds of one configuration differ."""


@dataclass(frozen=True)
class Configuration:
    """The runs of one configuration that are at the same step."""

    name: str
    """Name of the first run folder, without its seed."""
    model: str
    parameters: int | None
    step: int
    evaluated: bool
    """Whether the measures are of evaluations, not the ends of smoothed training curves."""
    runs: int
    pflops: float | None
    """Mean training compute, 1e15 FLOP."""
    measures: dict[str, tuple[float, float] | None]
    """Mean and half the width of the 95 % interval of loss, bpp and PSNR; NaN for the width of a single run."""


def grouped(states: Sequence[RunState]) -> list[Configuration]:
    """The configurations of all runs that have a loss, in order of their first run."""
    groups: dict[tuple[str, int, bool], list[RunState]] = {}
    for state in states:
        if state.loss is not None:
            groups.setdefault((_configuration(state.folder), state.step, state.evaluated), []).append(state)
    return [_summary(members) for members in groups.values()]


def _configuration(folder: Path) -> str:
    """Configuration of a run without what differs between seeds, or its path if it cannot be read."""
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG_NAME))
        for section, keys in _PLACES.items():
            config[section] = {key: value for key, value in config[section].items() if key not in keys}
        return json.dumps(config, sort_keys=True)
    except (YAMLError, OmegaConfBaseException, OSError, KeyError, TypeError, AttributeError):
        return str(folder)


def _summary(members: Sequence[RunState]) -> Configuration:
    first, plan = members[0], members[0].plan
    name = _SEED.sub("", first.name).strip(",") if len(members) > 1 else first.name
    model = plan.model if plan else "?"
    return Configuration(
        name=name or model,
        model=model,
        parameters=plan.parameters if plan else None,
        step=first.step,
        evaluated=first.evaluated,
        runs=len(members),
        pflops=(_mean([state.pflops for state in members]) or (None,))[0],
        measures={key: _mean([getattr(state, key) for state in members]) for key in MEASURES},
    )


def _mean(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and half the width of its interval by Student's t."""
    known = np.array([value for value in values if value is not None])
    if not known.size:
        return None
    error = known.std(ddof=1) / np.sqrt(known.size) if known.size > 1 else np.nan
    return float(known.mean()), float(stats.t.ppf((1 + LEVEL) / 2, max(known.size - 1, 1)) * error)


def seeds_table(rows: Sequence[Configuration]) -> Table:
    """One line per configuration; a loss of training is marked by an asterisk."""
    headings = ["configuration", "model", "size", "step", "runs", "loss", "bpp", "PSNR", "PFLOPs"]
    lines = [
        [
            row.name,
            row.model,
            count(row.parameters) if row.parameters else DASH,
            f"{row.step:,}",
            str(row.runs),
            *(with_error(*measure) if (measure := row.measures[key]) else DASH for key in MEASURES),
            DASH if row.pflops is None else significant(row.pflops, 3),
        ]
        for row in rows
    ]
    for row, line in zip(rows, lines, strict=True):
        line[5] += "" if row.evaluated else "*"
    remarks = ["± half the 95 % interval of the mean over seeds"] if any(row.runs > 1 for row in rows) else []
    remarks += [] if all(row.evaluated for row in rows) else ["* smoothed training loss, not evaluated yet"]
    table = terminal_table(headings, lines, words=2)
    table.caption, table.caption_justify = "\n".join(remarks), "left"
    return table


def write_csv(rows: Sequence[Configuration], path: Path) -> None:
    """Write one line per configuration; an interval is given by its ends, empty for a single run."""
    ends = [f"{key}{end}" for key in MEASURES for end in ("", "_low", "_high")]
    lines: list[list[Any]] = [["configuration", "model", "parameters", "step", "runs", "evaluated", "pflops", *ends]]
    for row in rows:
        numbers: list[float | None] = []
        for mean, half in (row.measures[key] or (np.nan, np.nan) for key in MEASURES):
            numbers += [None if np.isnan(number) else number for number in (mean, mean - half, mean + half)]
        lines.append([row.name, row.model, row.parameters, row.step, row.runs, row.evaluated, row.pflops, *numbers])
    with writing(path):
        write_text(path, csv_text(lines))
