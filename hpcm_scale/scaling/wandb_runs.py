"""Runs read back from what wandb keeps on disk, for those whose journal is elsewhere.

A `.wandb` file has no public description; it is read with wandb's own reader, the command `wandb leet inspect`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from hpcm_scale.errors import UserError
from hpcm_scale.scaling.records import Records
from hpcm_scale.scaling.runs import Run, described
from hpcm_scale.tracking.journal import REQUIRED
from hpcm_scale.tracking.progress import progress
from hpcm_scale.tracking.wandb_view import RUN_ID_FILE


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
