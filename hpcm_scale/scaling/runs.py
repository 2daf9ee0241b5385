"""Runs read back from their folders, while they live or after they ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from hpcm_scale.errors import UserError
from hpcm_scale.tracking.journal import FILE_NAME, read_journal

CONFIG_NAME = "config.yaml"


@dataclass(frozen=True)
class Run:
    """One run folder: its resolved configuration and its journal."""

    name: str
    """The folder's name."""
    config: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return self.records[-1]["step"] if self.records else 0

    @property
    def finished(self) -> bool:
        """Whether the schedule has been run to its end."""
        return self.step >= self.config["train"]["steps"]

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Cumulative PFLOPs and values of `metric`, float64, where the journal has a (finite) value."""
        points = [
            (record["compute/pflops"], record[metric]) for record in self.records if record.get(metric) is not None
        ]
        compute, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
        return compute, values


def load_run(folder: str | Path) -> Run:
    """Read one run folder. Raises UserError when its journal or configuration is missing or damaged."""
    folder = Path(folder).resolve()
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder} holds no {CONFIG_NAME}; name a folder that training has made")
    config = OmegaConf.to_container(OmegaConf.load(folder / CONFIG_NAME))
    return Run(folder.name, config, read_journal(folder / FILE_NAME))


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Load runs; a path is a run folder, or a folder that holds runs at any depth.

    They come in the order of `paths`, then of names, each once. Raises UserError when a path does not
    exist or holds no run.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"there is no folder {path}; name run folders, or a folder that holds some")
        folders = list(_run_folders(path.resolve()))
        if not folders:
            raise UserError(f"no run in {path}: a run folder holds {FILE_NAME}; has training started?")
        found.update(dict.fromkeys(folders))
    return [load_run(folder) for folder in found]


def _run_folders(folder: Path) -> Iterator[Path]:
    if (folder / FILE_NAME).is_file():
        yield folder
        return
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            yield from _run_folders(child)
