"""Runs read back from their folders, while they live or after they ended."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hpcm_scale.errors import UserError, shown
from hpcm_scale.tracking.journal import FILE_NAME, REQUIRED, new_records
from hpcm_scale.tracking.progress import progress
from hpcm_scale.tracking.wandb_view import RUN_ID_FILE

# The lines of a journal as columns: a million lines in a tenth of the memory of a million dictionaries.


_CHUNK = 8192


class Records(Sequence[dict[str, float]]):
    """The numbers of journal lines, in the order they were written; an index gives that line's numbers.

    A number that is null (it was not finite) or missing is NaN in its column, and not in its line.
    Anything but numbers is left out. Raises TypeError when a line is no dictionary.
    """

    def __init__(self, lines: Iterable[dict[str, Any]] = ()) -> None:
        self.nulls: Counter[str] = Counter()
        """How many lines hold null for a key."""
        chunks: list[dict[str, np.ndarray]] = []
        sizes: list[int] = []
        lines = iter(lines)
        while chunk := list(islice(lines, _CHUNK)):
            chunks.append(self._columns_of(chunk))
            sizes.append(len(chunk))
        keys = dict.fromkeys(key for chunk in chunks for key in chunk)
        absent = [np.full(size, np.nan) for size in sizes]
        self._length = sum(sizes)
        self._columns = {
            key: np.concatenate([chunk.get(key, none) for chunk, none in zip(chunks, absent, strict=True)])
            for key in keys
        }

    def _columns_of(self, lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        if not all(isinstance(line, dict) for line in lines):
            raise TypeError("a line is no JSON object")
        columns = {}
        for key in dict.fromkeys(chain.from_iterable(lines)):
            try:
                values = np.array([line.get(key, np.nan) for line in lines], dtype=np.float64)  # null becomes NaN
            except (TypeError, ValueError):  # texts, lists
                values = np.array([_number(line.get(key)) for line in lines])
            values[np.isinf(values)] = np.nan
            if np.isnan(values).any() and (nulls := sum(key in line and line[key] is None for line in lines)):
                self.nulls[key] += nulls
            columns[key] = values
        return columns

    def column(self, key: str) -> np.ndarray:
        """float64 (lines,): the values of `key`, NaN where a line has none."""
        return self._columns.get(key, np.full(self._length, np.nan))

    def rows(self, key: str) -> np.ndarray:
        """Indices of the lines that hold a (finite) value of `key`, ascending in step.

        Of several lines of one step the last counts: a run that was taken back to a checkpoint went over
        those steps again.
        """
        held = self._holding(key)[::-1]
        return held[np.unique(self.column("step")[held], return_index=True)[1]]

    def repeated(self, key: str) -> int:
        """How many lines with a value of `key` count no more, for a later one is of the same step."""
        return self._holding(key).size - self.rows(key).size

    def _holding(self, key: str) -> np.ndarray:
        needed = [self.column(name) for name in (key, "step", "compute/pflops")]
        return np.flatnonzero(np.isfinite(needed).all(axis=0))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex) -> dict[str, float]:
        values = ((key, column[index].item()) for key, column in self._columns.items())
        return {key: int(value) if value.is_integer() else value for key, value in values if not math.isnan(value)}

    def __iter__(self) -> Iterator[dict[str, float]]:
        return (self[index] for index in range(self._length))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan


CONFIG_NAME = "config.yaml"


@dataclass(frozen=True, eq=False)
class Run:
    """One run: its resolved configuration and its journal."""

    name: str
    """The folder's name (`shown`), or the wandb run's; `find_runs` puts folders before it until no two are the same."""
    folder: Path
    config: dict[str, Any]
    records: Records

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        rows = self.records.rows("step")
        return int(self.records.column("step")[rows[-1]]) if rows.size else 0

    @property
    def finished(self) -> bool:
        """Whether the schedule has been run to its end."""
        return self.step >= self.config["train"]["steps"]

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Cumulative PFLOPs and values of `metric`, float64, where the journal has a (finite) value."""
        rows = self.records.rows(metric)
        return self.records.column("compute/pflops")[rows], self.records.column(metric)[rows]


def load_run(folder: str | Path) -> Run:
    """Read one run folder. Raises UserError when its journal or configuration is missing or damaged."""
    folder = Path(folder).resolve()
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder} holds no {CONFIG_NAME}; name a folder that training has made")
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder / CONFIG_NAME))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{folder / CONFIG_NAME} cannot be read; mend it, or leave this run out") from error
    return Run(shown(folder.name), folder, described(config, folder / CONFIG_NAME), _journal(folder / FILE_NAME))


def described(config: Any, source: Path) -> dict[str, Any]:
    """`config`, if it says what every run's does (UserError)."""
    for key, kind in (("model.name", str), ("objective.lmbda", (int, float)), ("train.steps", (int, float))):
        section, name = key.split(".")
        values = config.get(section) if isinstance(config, dict) else None
        if not isinstance(values, dict) or not isinstance(values.get(name), kind):
            raise UserError(f"{source} does not say {key}; name runs that hpcm_scale has trained")
    return config


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Load runs; a path is a run folder, or a folder that holds runs at any depth, or kept by wandb.

    Where a path holds no journal, runs are read from what wandb kept: the path is a `.wandb` file, or a
    folder with such files at any depth (`wandb_runs`). Runs come in the order of `paths`, then of names,
    each once, under names of their own. Raises UserError when a path does not exist or holds no run.
    """
    folders: dict[Path, None] = {}
    logs: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"there is no folder {path}; name run folders, or a folder that holds some")
        with_journal = [file.parent for file in _files(path, FILE_NAME, set())]
        kept_by_wandb = [] if with_journal else list(_files(path, "*.wandb", set()))
        if not with_journal and not kept_by_wandb:
            raise UserError(f"no run in {path}: a run folder holds {FILE_NAME}; has training started?")
        folders.update(dict.fromkeys(with_journal))
        logs.update(dict.fromkeys(kept_by_wandb))
    runs = [load_run(folder) for folder in progress(folders, description="reading", unit="run")]
    if logs:
        runs += load_wandb_runs(logs, known=runs)
    return _distinct(runs)


def _files(path: Path, pattern: str, seen: set[Path]) -> Iterator[Path]:
    """The file `path`, or files below it in order of their folders; nothing is looked for below one that is found.

    Each folder is looked at once, whatever links lead to it.
    """
    if path.match(pattern) and path.is_file():
        yield path.resolve()
    elif path.is_dir() and path.resolve() not in seen:
        seen.add(path.resolve())
        found = sorted(child.resolve() for child in path.glob(pattern) if child.is_file())
        yield from found
        if not found:
            for child in sorted(path.iterdir()):
                if not child.name.startswith("."):
                    yield from _files(child, pattern, seen)


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """The runs under names of their own: those that share one get as many folders before it as it takes."""
    parts = [tuple(map(shown, run.folder.parts)) for run in runs]
    places = [own if own[-1] == run.name else (*own, run.name) for own, run in zip(parts, runs, strict=True)]
    lengths = [1] * len(runs)
    while True:
        names = ["/".join(place[-length:]) for place, length in zip(places, lengths, strict=True)]
        times = Counter(names)
        longer = [
            length + (times[name] > 1 and length < len(place))
            for name, length, place in zip(names, lengths, places, strict=True)
        ]
        if longer == lengths:
            return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
        lengths = longer


def _journal(path: Path) -> Records:
    try:
        with path.open("rb") as journal:
            return Records(new_records(journal))
    except FileNotFoundError:
        raise UserError(f"there is no journal at {path}; name a run folder that holds {FILE_NAME}") from None
    except TypeError:
        raise UserError(f"{path} holds a line that is no JSON object; remove the line") from None


# Runs read back from what wandb keeps on disk, for those whose journal is elsewhere.
#
# A `.wandb` file has no public description; it is read with wandb's own reader, the command `wandb leet inspect`.


def load_wandb_runs(files: Iterable[str | Path], known: Sequence[Run] = ()) -> list[Run]:
    """Runs from `.wandb` files, in the order of `files`; each is named as in wandb, its folder is the file's.

    Files of one wandb run id are one run that was resumed: the lines of each follow those of the file before
    it in name, and with it the time of its start. Runs whose journal is among `known` are left out, as it
    holds more, and so are wandb runs that have no line of training, unless that leaves none at all: then, and for
    a file that cannot be read, UserError.
    """
    ids = {path.read_text(encoding="utf-8").strip() for run in known if (path := run.folder / RUN_ID_FILE).is_file()}
    files = list(map(Path, files))
    logs: dict[str, list[_Log]] = {}
    for file in progress(files, description="reading wandb", unit="file"):
        log = _read(file)
        if log.records:
            logs.setdefault(log.id, []).append(log)
    runs = [_run(parts) for id, parts in logs.items() if id not in ids]
    if not runs and not known:
        raise UserError(f"{files[0]} holds no line of training; name what wandb kept of runs of hpcm_scale")
    return runs


@dataclass
class _Log:
    """What one `.wandb` file holds."""

    file: Path
    id: str
    name: str
    config: dict[str, Any]
    records: Records


def _run(logs: Sequence[_Log]) -> Run:
    logs = sorted(logs, key=lambda log: log.file.parent.name)
    last = logs[-1]
    records = last.records if len(logs) == 1 else Records(chain.from_iterable(log.records for log in logs))
    return Run(last.name, last.file.parent, described(last.config, last.file), records)


def _read(file: Path) -> _Log:
    log = _Log(file, "", "", {}, Records())

    def lines() -> Iterator[dict[str, Any]]:
        for entry in _entries(file):
            if entry["type"] == "run":
                log.id, log.name = entry["run"]["run_id"], entry["run"].get("display_name", file.stem)
            if entry["type"] in ("run", "config"):
                changed = entry["run"].get("config", {}) if entry["type"] == "run" else entry["config"]
                log.config |= changed.get("update", {})
            elif entry["type"] == "history" and all(key in entry["history"]["item"] for key in REQUIRED):
                yield {key: value for key, value in entry["history"]["item"].items() if not key.startswith("_")}

    log.records = Records(lines())
    if not log.id:
        raise UserError(f"{file} holds no run that wandb {_wandb_version()} can read; leave it out")
    return log


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    """The records of a `.wandb` file that tell of the run, its configuration and its metrics."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    environment = os.environ | {"WANDB_ERROR_REPORTING": "false"}  # or it looks up its maker's server
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as reader:
        for line in reader.stdout:
            # Most lines are summaries: as long as the metrics they repeat, and not worth parsing.
            if any(kind in line for kind in (b'"history"', b'"run"', b'"config"')):
                yield json.loads(line)


def _wandb_version() -> str:
    import wandb

    return wandb.__version__
