"""Runs read back from their folders, while they live or after they ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hpcm_scale.errors import UserError
from hpcm_scale.scaling.records import Records
from hpcm_scale.streams import shown
from hpcm_scale.tracking.journal import FILE_NAME, new_records
from hpcm_scale.tracking.progress import progress

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
        from hpcm_scale.scaling.wandb_runs import load_wandb_runs

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
