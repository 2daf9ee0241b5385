"""Runs read from their folders or from wandb's files, finished or not."""

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

from hpcm_scale.errors import UserError, first_line, printable
from hpcm_scale.tracking.journal import FILE_NAME, REQUIRED, new_records
from hpcm_scale.tracking.progress import progress
from hpcm_scale.tracking.wandb_view import RUN_ID_FILE

CONFIG_NAME = "config.yaml"
_CHUNK = 8192
"""Journal lines that are parsed before they are turned into columns."""


class Records(Sequence[dict[str, float]]):
    """The numbers of journal lines as columns: a tenth of the memory of a list of dictionaries.

    An index gives the numbers of one line, in the order of the journal. A value that is null or missing is NaN in its
    column and absent from its line. Values that are not numbers are dropped. Raises TypeError for a line that is not a
    dictionary.
    """

    def __init__(self, lines: Iterable[dict[str, Any]] = ()) -> None:
        self.nulls: Counter[str] = Counter()
        """Number of lines with null, by key."""
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
            raise TypeError("a line is not a JSON object")
        columns = {}
        for key in dict.fromkeys(chain.from_iterable(lines)):
            try:
                values = np.array([line.get(key, np.nan) for line in lines], dtype=np.float64)  # null becomes NaN
            except (TypeError, ValueError):  # strings, lists
                values = np.array([_number(line.get(key)) for line in lines])
            values[np.isinf(values)] = np.nan
            if np.isnan(values).any() and (nulls := sum(key in line and line[key] is None for line in lines)):
                self.nulls[key] += nulls
            columns[key] = values
        return columns

    def column(self, key: str) -> np.ndarray:
        """Values of `key`, float64 (lines,); NaN where a line has none."""
        return self._columns.get(key, np.full(self._length, np.nan))

    def rows(self, key: str) -> np.ndarray:
        """Indices of the lines with a finite value of `key`, ascending in step.

        Of several lines with the same step the last one counts: a run that resumed from an earlier checkpoint repeats
        steps.
        """
        held = self._holding(key)[::-1]
        return held[np.unique(self.column("step")[held], return_index=True)[1]]

    def repeated(self, key: str) -> int:
        """Number of lines with a value of `key` that a later line with the same step replaces."""
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


@dataclass(frozen=True, eq=False)
class Run:
    """One run: its resolved configuration and its journal."""

    name: str
    """Name of the folder (`printable`), or of the wandb run; `find_runs` prepends folders until names are unique."""
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
        """Whether the run has reached train.steps."""
        return self.step >= self.config["train"]["steps"]

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Cumulative PFLOPs and values of `metric`, float64 (n,), where the journal has a finite value."""
        rows = self.records.rows(metric)
        return self.records.column("compute/pflops")[rows], self.records.column(metric)[rows]

    def setting(self, key: str) -> Any:
        """Value of a configuration key such as "data.crop"; None if the configuration lacks it."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value


def load_run(folder: str | Path) -> Run:
    """Read a run folder. Raises UserError if its configuration or journal is missing or malformed."""
    folder = Path(folder).resolve()
    config = folder / CONFIG_NAME
    if not config.is_file():
        raise UserError("not-a-run-folder", CONFIG_NAME, f"{folder} has no {CONFIG_NAME}; give a run folder")
    try:
        values = OmegaConf.to_container(OmegaConf.load(config))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(
            "unreadable-run-config",
            CONFIG_NAME,
            f"{config} cannot be read ({first_line(error)}); correct it or omit this run",
        ) from error
    return Run(printable(folder.name), folder, _described(values, config), _journal(folder / FILE_NAME))


def _described(config: Any, source: Path) -> dict[str, Any]:
    """`config` if it has the keys that every run has."""
    for key, kind in (("model.name", str), ("objective.lmbda", (int, float)), ("train.steps", (int, float))):
        section, name = key.split(".")
        values = config.get(section) if isinstance(config, dict) else None
        if not isinstance(values, dict) or not isinstance(values.get(name), kind):
            raise UserError(
                "incomplete-run-config", key, f"{source} has no valid {key}; give runs trained by hpcm_scale"
            )
    return config


def _journal(path: Path) -> Records:
    try:
        with path.open("rb") as journal:
            return Records(new_records(journal))
    except FileNotFoundError:
        raise UserError(
            "missing-journal", FILE_NAME, f"{path} does not exist; give a run folder with a {FILE_NAME}"
        ) from None
    except TypeError:
        raise UserError(
            "non-object-journal-line", FILE_NAME, f"{path} has a line that is not a JSON object; remove the line"
        ) from None


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Load the runs in and below each path, in the order of `paths` and then of names, without duplicates.

    A path without a journal is searched for `.wandb` files instead (`load_wandb_runs`). Raises UserError for a path
    that does not exist or has no run.
    """
    folders: dict[Path, None] = {}
    logs: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise UserError("missing-run-path", "", f"{path} does not exist; give run folders or a folder of runs")
        with_journal = [file.parent for file in _files(path, FILE_NAME, set())]
        of_wandb = [] if with_journal else list(_files(path, "*.wandb", set()))
        if not with_journal and not of_wandb:
            raise UserError(
                "no-runs-found",
                "",
                f"{path} contains no {FILE_NAME} and no .wandb file; check that training has started",
            )
        folders.update(dict.fromkeys(with_journal))
        logs.update(dict.fromkeys(of_wandb))
    runs = [load_run(folder) for folder in progress(folders, description="reading", unit="run")]
    if logs:
        runs += load_wandb_runs(logs, known=runs)
    return _distinct(runs)


def _files(path: Path, pattern: str, seen: set[Path]) -> Iterator[Path]:
    """The file `path`, or the files below it in order of their folders; a folder with a match is not searched deeper.

    Each folder is searched once, however many links lead to it.
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
    """The runs with unique names: duplicates get as many parent folders as needed."""
    parts = [tuple(map(printable, run.folder.parts)) for run in runs]
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


# Runs from wandb's files, for runs without a journal. The format is not documented, so the files are read
# with wandb's own command `wandb leet inspect`.


def load_wandb_runs(files: Iterable[str | Path], known: Sequence[Run] = ()) -> list[Run]:
    """Runs from `.wandb` files in the order of `files`; a run has the name it has in wandb and the folder of its file.

    Files with the same run id belong to one resumed run; their lines are joined in the order of the file names, which
    is that of their start. Runs in `known` are skipped, since their journals hold more, and so are wandb runs without
    training lines. Raises UserError if none is left, or for a file that cannot be read.
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
        raise UserError(
            "no-training-in-wandb-file", "", f"{files[0]} has no training lines; give wandb files of hpcm_scale runs"
        )
    return runs


@dataclass
class _Log:
    """The contents of one `.wandb` file."""

    file: Path
    id: str
    name: str
    config: dict[str, Any]
    records: Records


def _run(logs: Sequence[_Log]) -> Run:
    logs = sorted(logs, key=lambda log: log.file.parent.name)
    last = logs[-1]
    records = last.records if len(logs) == 1 else Records(chain.from_iterable(log.records for log in logs))
    return Run(last.name, last.file.parent, _described(last.config, last.file), records)


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
        raise UserError("unreadable-wandb-file", "", f"the installed wandb cannot read a run from {file}; omit it")
    return log


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    """Entries of a `.wandb` file with the run, its configuration or its metrics."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    environment = os.environ | {"WANDB_ERROR_REPORTING": "false"}  # keeps wandb from contacting its error server
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as reader:
        for line in reader.stdout or ():
            # Most lines are summaries, as long as the metrics they repeat: not parsed.
            if any(kind in line for kind in (b'"history"', b'"run"', b'"config"')):
                yield json.loads(line)
