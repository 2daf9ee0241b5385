"""Resumable checkpoints: folders that count only once their completion marker is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hpcm_scale.errors import UserError
from hpcm_scale.files import sync_folder, write_text
from hpcm_scale.training.engine import Engine

_MARKER = "complete.json"


class Checkpoints:
    """The folder `checkpoints/` of a run: `step_00000040/` holds the engine's files and the marker.

    The marker is written last, when every process has written its files, and holds the loop's state.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(marker.parent for marker in self.folder.glob(f"step_*/{_MARKER}"))

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest complete checkpoint and the loop's state in it."""
        complete = self.complete()
        return (complete[-1], _state(complete[-1])) if complete else None

    def at(self, step: int) -> tuple[Path, dict[str, Any]] | None:
        """The complete checkpoint of `step` and the loop's state in it."""
        folder = self._of(step)
        return (folder, _state(folder)) if folder in self.complete() else None

    def steps(self) -> list[int]:
        """The steps that have complete checkpoints, ascending."""
        return sorted(int(folder.name.removeprefix("step_")) for folder in self.complete())

    def reached(self) -> int:
        """The step of the newest one, 0 where there is none."""
        return max(self.steps(), default=0)

    def save(self, engine: Engine, state: dict[str, Any], keep: int, keep_at: Collection[int] = ()) -> None:
        """Write a checkpoint of step `state["step"]`; remove all but the newest `keep` and those of `keep_at`."""
        folder = self._of(state["step"])
        if engine.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # what an interrupted save left
            folder.mkdir(parents=True)
        engine.barrier()
        engine.save(folder)
        engine.barrier()
        if engine.rank == 0:
            write_text(folder / _MARKER, json.dumps(state, indent=1))
            sync_folder(self.folder)
            kept = {*self.complete()[-keep:], *map(self._of, keep_at)}
            for path in sorted(self.folder.glob("step_*")):
                if path not in kept:
                    (path / _MARKER).unlink(missing_ok=True)
                    shutil.rmtree(path)
        engine.barrier()

    def _of(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"


def _state(checkpoint: Path) -> dict[str, Any]:
    marker = checkpoint / _MARKER
    try:
        return json.loads(marker.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{marker} is damaged; remove {checkpoint} to go on from the one before") from error
