"""Resumable checkpoints: folders that count only once their manifest is there, and as long as it tells the truth."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hpcm_scale.config.schema import TrainConfig
from hpcm_scale.errors import UserError
from hpcm_scale.files import sha256_of, sync_folder, write_text

_MANIFEST = "complete.json"
_FOLDER = re.compile(r"step_\d{8,}")  # and no copy that somebody has put beside it


class File(NamedTuple):
    """What the manifest says of a file."""

    bytes: int
    sha256: str


@dataclass
class Retention:
    """Which checkpoints stay: the newest `keep`, every `every`-th step's and those of `steps` for good, the best."""

    keep: int
    every: int | None = None
    steps: Sequence[int] = field(default_factory=list)
    best: bool = False

    @classmethod
    def of(cls, train: TrainConfig) -> Retention:
        """As configured."""
        return cls(train.keep_checkpoints, train.keep_every, train.keep_at, train.keep_best)

    def kept(self, losses: dict[int, float | None]) -> set[int]:
        """Of the steps that have checkpoints, those that stay; `losses` are evaluations of just these steps."""
        kept = {*sorted(losses)[-self.keep :], *self.steps}
        kept |= {step for step in losses if self.every and step and step % self.every == 0}
        evaluated = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
        if self.best and evaluated:
            kept.add(min(evaluated, key=evaluated.__getitem__))
        return kept


class Checkpoint:
    """One folder, `step_00000040`: files, and a manifest that was written after all of them.

    The manifest holds the size and the hash of every file, the loop's state, and a hash of itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = folder / _MANIFEST

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.folder.name.removeprefix("step_"))

    def read(self) -> tuple[dict[str, File], dict[str, Any]]:
        """Files and the loop's state, as the manifest tells them. Raises ValueError if it is damaged."""
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
            files, state = content["files"], content["state"]
            if content["sha256"] != _digest(files, state):
                raise ValueError
            return {name: File(*facts) for name, facts in files.items()}, state
        except (ValueError, KeyError, TypeError, OSError):
            raise ValueError(f"{_MANIFEST} is damaged, or of another version") from None

    @property
    def evaluation(self) -> float | None:
        """Evaluation loss at its step; None if there was none, or it cannot be told."""
        try:
            return self.read()[1].get("evaluation")
        except ValueError:
            return None

    def complete(self, files: dict[str, File], state: dict[str, Any]) -> None:
        """Write the manifest: from now on the checkpoint counts."""
        content = {"sha256": _digest(files, state), "files": files, "state": state}
        write_text(self.manifest, json.dumps(content, indent=1))
        sync_folder(self.folder.parent)

    def flaw(self, *, hashes: bool = False, rank: int = 0, world_size: int = 1) -> str:
        """What is wrong with it, empty if nothing is: sizes are always compared.

        With `hashes`, so are those of the files, of which each of `world_size` processes looks at its share.
        """
        try:
            files, _ = self.read()
        except ValueError as error:
            return str(error)
        for number, (name, told) in enumerate(sorted(files.items())):
            path = self.folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != told.bytes:
                return f"{name} has {path.stat().st_size} bytes instead of {told.bytes}"
            if hashes and number % world_size == rank and sha256_of(path) != told.sha256:
                return f"{name} is damaged"
        return ""

    def remove(self) -> None:
        """Delete it; cut off in between, it does not count any more."""
        self.manifest.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


class Choice(NamedTuple):
    """The checkpoint to go on from."""

    checkpoint: Checkpoint
    state: dict[str, Any]
    """The loop's."""
    damaged: list[str]
    """Newer ones that were passed over, and what is wrong with them."""


Examine = Callable[[Checkpoint], str]
"""What is wrong with a checkpoint; empty if nothing is."""


class Checkpoints:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def complete(self) -> list[Checkpoint]:
        """Those with a manifest, oldest first."""
        return [checkpoint for checkpoint in self._begun() if checkpoint.manifest.is_file()]

    def newest(self, examine: Examine = Checkpoint.flaw) -> Choice | None:
        """The newest one without a flaw, None where there has been none.

        Raises UserError if all there are have one: to begin again from nothing is not for us to decide.
        """
        damaged = []
        for checkpoint in reversed(self.complete()):
            flaw = examine(checkpoint)
            if not flaw:
                return Choice(checkpoint, checkpoint.read()[1], damaged)
            damaged.append(f"{checkpoint.folder}: {flaw}")
        if damaged:
            raise UserError(f"no checkpoint is whole ({'; '.join(damaged)}); remove {self.folder} to begin again")
        return None

    def at(self, step: int, examine: Examine = Checkpoint.flaw) -> Choice | None:
        """The complete checkpoint of `step`. Raises UserError if it is damaged."""
        checkpoint = self.of(step)
        if not checkpoint.manifest.is_file():
            return None
        flaw = examine(checkpoint)
        if flaw:
            raise UserError(f"{checkpoint.folder} cannot be used ({flaw}); choose another step")
        return Choice(checkpoint, checkpoint.read()[1], [])

    def steps(self) -> list[int]:
        """The steps that have complete checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self.complete()]

    def reached(self) -> int:
        """The step of the newest one, 0 where there is none."""
        return max(self.steps(), default=0)

    def of(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, be it there or not."""
        return Checkpoint(self.folder / f"step_{step:08d}")

    def retain(self, retention: Retention, newest: int) -> None:
        """Remove what is not kept now that there is the one of step `newest`, and what interrupted saves have left.

        Later ones are damaged: they were passed over.
        """
        losses = {checkpoint.step: checkpoint.evaluation for checkpoint in self.complete() if checkpoint.step <= newest}
        kept = retention.kept(losses)
        for checkpoint in self._begun():
            if checkpoint.step not in kept or checkpoint.step > newest:
                checkpoint.remove()

    def _begun(self) -> list[Checkpoint]:
        """The complete ones and others, oldest first."""
        found = [Checkpoint(folder) for folder in self.folder.glob("step_*") if _FOLDER.fullmatch(folder.name)]
        return sorted(found, key=lambda checkpoint: checkpoint.step)


def _digest(files: dict[str, Any], state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([files, state], sort_keys=True).encode()).hexdigest()
