"""A portable copy of runs: configurations and thinned journals, without paths of the machine."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from hpcm_scale.errors import UserError
from hpcm_scale.files import write_text
from hpcm_scale.formatting import counted
from hpcm_scale.scaling.filters import DECADES, RATE
from hpcm_scale.scaling.runs import CONFIG_NAME, Run
from hpcm_scale.tracking.journal import FILE_NAME, REQUIRED, read_journal
from hpcm_scale.tracking.progress import progress

PATHS = ("init_from", "run.dir", "run.cooldown_of", "machine.fixed_rate", "eval.images", "data.shards", "data.cache")
"""Configuration keys with paths, of which the last component is kept."""
WIDEST = DECADES
"""Largest span of compute, in decades, of averaged training lines: one standard deviation of the smoothing."""
STEEPEST = RATE / 2
"""Largest change of the learning rate between them, as a fraction of its peak."""
FEWEST = 50
"""Training lines that remain of every run, enough to smooth a cooldown."""
DIGITS = 6
"""Significant digits of a mean over training lines, whose losses are fp32."""


def collect(runs: Sequence[Run], folder: Path, *, every: int | None = None, most_bytes: int = 1_000_000) -> int:
    """Write `folder`/<run>/config.yaml and metrics.jsonl for each run; returns the total size in bytes.

    Training lines are averaged over up to `every` lines, by default over as few as keep the total within `most_bytes`.
    Evaluations and the last training line are unchanged, and perf/* is dropped. Existing files are replaced. Raises
    UserError if a run has no journal, would be replaced by its own copy, or `most_bytes` is too small.
    """
    for run in runs:
        if (folder / run.name).resolve() in {each.folder.resolve() for each in runs}:
            raise UserError(
                "collect-into-runs", "--out", f"--out {folder} would replace the run {run.name}; choose another folder"
            )
    configs = {run.name: portable(run.config) for run in runs}
    records = {run.name: read_journal(run.folder / FILE_NAME) for run in progress(runs, description="read", unit="run")}
    spare = most_bytes - _size(configs)
    journals = _within(records, spare, most_bytes) if every is None else _journals(records, every)
    for name in progress(journals, description="write", unit="run"):
        write_text(folder / name / CONFIG_NAME, configs[name])
        write_text(folder / name / FILE_NAME, journals[name])
    return _size(configs) + _size(journals)


def portable(config: dict[str, Any]) -> str:
    """A run's configuration as YAML, with only the last component of every path."""
    copy = OmegaConf.create(config)
    for key in PATHS:
        if value := OmegaConf.select(copy, key):
            OmegaConf.update(copy, key, _last_component(value))
    return OmegaConf.to_yaml(copy)


def _last_component(value: Any) -> Any:
    """The last component of a path, or of every path of a list such as data.shards."""
    if isinstance(value, ListConfig):
        return [_last_component(each) for each in value]
    if isinstance(value, DictConfig):
        return {**value, "path": _last_component(value["path"])}
    return PurePosixPath(str(value)).name


def thin(records: Sequence[dict[str, Any]], every: int, fewest: int = FEWEST) -> Iterator[dict[str, Any]]:
    """Journal lines with up to `every` training lines averaged, as long as compute and learning rate hardly change.

    At least about `fewest` training lines remain. An averaged line has the position of the middle line, the sum of
    train/skipped, the last learning rate, and the mean of every other finite value.
    """
    group: list[dict[str, Any]] = []
    peak = max((record.get("train/learning_rate") or 0.0 for record in records), default=0.0)
    every = max(1, min(every, sum(not _is_evaluation(record) for record in records) // fewest))
    last = max((index for index, record in enumerate(records) if not _is_evaluation(record)), default=-1)
    for index, record in enumerate(records):
        kept = {key: value for key, value in record.items() if not key.startswith("perf/")}
        unchanged = _is_evaluation(kept) or index == last
        if group and (unchanged or len(group) == every or _differ(group[0], kept, peak)):
            yield _mean(group)
            group = []
        if unchanged:
            yield kept
        else:
            group.append(kept)
    assert not group


def _is_evaluation(record: dict[str, Any]) -> bool:
    return any(key.startswith("eval/") for key in record)


def _differ(first: dict[str, Any], last: dict[str, Any], peak: float) -> bool:
    """Whether smoothing would resolve these lines."""
    rates = [line.get("train/learning_rate") or 0.0 for line in (first, last)]
    decades = math.log10(last["compute/pflops"] / first["compute/pflops"])
    return decades > WIDEST or abs(rates[1] - rates[0]) > STEEPEST * peak


def _mean(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if len(group) == 1:
        return group[0]
    line = {key: group[len(group) // 2][key] for key in REQUIRED}
    for key in dict.fromkeys(key for record in group for key in record if key not in REQUIRED):
        values = [record[key] for record in group if record.get(key) is not None]
        if key == "train/skipped":
            line[key] = sum(values)
        elif key in ("train/learning_rate", "train/upscaled", "data/images", "data/epoch"):
            line[key] = values[-1] if values else None
        else:
            line[key] = float(f"{sum(values) / len(values):.{DIGITS}g}") if values else None
    return line


Records = dict[str, list[dict[str, Any]]]
"""Journal lines by run name."""


def _journals(records: Records, every: int) -> dict[str, str]:
    return {name: "".join(f"{json.dumps(line)}\n" for line in thin(lines, every)) for name, lines in records.items()}


def _within(records: Records, spare: int, most: int) -> dict[str, str]:
    """The journals with the smallest `every` whose size is at most `spare` bytes."""
    too_small, every = 0, 1
    longest = max(map(len, records.values()))
    while _size(journals := _journals(records, every)) > spare:
        if every >= longest:
            least = math.ceil((_size(journals) + most - spare) / 1e4) * 10_000
            raise UserError(
                "most-bytes-too-small",
                "--most-bytes",
                f"{counted(len(records), 'journal')} cannot be thinned to {counted(most, 'byte')}; use --most-bytes "
                f"{least}",
            )
        too_small, every = every, 2 * every
    while every - too_small > 1:
        middle = (every + too_small) // 2
        tried = _journals(records, middle)
        if _size(tried) > spare:
            too_small = middle
        else:
            every, journals = middle, tried
    return journals


def _size(texts: dict[str, str]) -> int:
    return sum(len(text.encode()) for text in texts.values())
