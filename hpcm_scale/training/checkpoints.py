"""Resumable checkpoints: folders that count only once their manifest is there, and as long as it tells the truth."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpcm_scale.config.schema import TrainConfig
from hpcm_scale.errors import UserError
from hpcm_scale.files import sha256_of, sync_folder, whole_file, write_text
from hpcm_scale.training.engines.base import Engine
from hpcm_scale.training.state_shards import HostCopy, Piece, share, write

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


# Writes checkpoints while training goes on: training waits for the copy off the device only.


class Saved(NamedTuple):
    """How a checkpoint ended."""

    step: int
    error: str
    """Why it does not count; empty if it does."""


class Saver:
    """The checkpoints that one process of a run takes part in writing.

    Every process writes its own file in a thread, and tells in the step's own exchange when it is there (`flags`);
    once all are (`settle`), the first process writes the manifest, in its thread, too. So a thread never talks to
    other processes.
    """

    def __init__(
        self,
        engine: Engine,
        checkpoints: Checkpoints,
        retention: Retention,
        before: Callable[[], None],
        beside: Sequence[Piece] = (),
    ) -> None:
        """`before` makes what must survive with a checkpoint, the journal, do so, or raises OSError.

        `beside`: pieces that are saved with the engine's, and sharded as they are.
        """
        self._engine = engine
        self._checkpoints = checkpoints
        self._retention = retention
        self._before = before
        self._beside = beside
        self._host = HostCopy(pin=engine.device.type == "cuda")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[Checkpoint, dict[str, Any]] | None = None
        self._written: Future | None = None
        self._completed: Future | None = None

    def begin(self, state: dict[str, Any]) -> list[Saved]:
        """Copy what is to be saved and start writing it; returns what became of the ones before.

        Every process calls it; `state` is the loop's, JSON values, the same on all.
        """
        before = self.finish()
        engine, checkpoint = self._engine, self._checkpoints.of(state["step"])
        if engine.rank == 0:
            with suppress(OSError):  # the thread meets it, too, and it is told
                checkpoint.remove()  # what an interrupted save left
                checkpoint.folder.mkdir(parents=True, exist_ok=True)
        engine.barrier()
        pieces = [*engine.pieces(), *self._beside]
        if engine.replicated:
            pieces = share(pieces, engine.rank, engine.world_size)
        tensors = self._host.take(pieces)
        self._saving = checkpoint, state | {"updates": engine.updates}
        self._written = self._thread.submit(self._write, checkpoint, tensors)
        return before

    def flags(self) -> tuple[float, float]:
        """Whether this process has written its file, and whether it could not: to be summed over all."""
        if self._written is None or not self._written.done():
            return 0.0, 0.0
        failed = self._written.exception() is not None
        return float(not failed), float(failed)

    def settle(self, written: float, failed: float) -> list[Saved]:
        """Complete or give up the checkpoint that all processes are done with; returns what has ended.

        `written` and `failed` are the sums of the flags. Every process calls it, and all get an answer of the
        same meaning, but that only the first one knows of trouble with the manifest.
        """
        ended = self._completion(wait=False)
        if self._written is None or written + failed < self._engine.world_size:
            return ended
        checkpoint, state = self._saving
        if failed:
            reasons = self._engine.gather(_reason(self._written))
            if self._engine.rank == 0:
                checkpoint.remove()  # makes room again
            ended.append(Saved(checkpoint.step, next(filter(None, reasons))))
        elif self._engine.rank == 0:
            self._completed = self._thread.submit(self._complete, checkpoint, state)
        self._written = None
        return ended

    def finish(self) -> list[Saved]:
        """Wait for what is being written; every process calls it. All learn of any trouble."""
        ended: list[Saved] = []
        if self._written is not None:
            self._written.exception()  # waits
            ended += self.settle(*self._engine.reduce(torch.tensor(self.flags())).tolist())
        ended += self._completion(wait=True)
        step = self._saving[0].step if self._saving else 0
        told = self._engine.gather(next((saved.error for saved in ended), ""))[0]
        return [Saved(step, told)] if told else []

    def amend(self, step: int, state: dict[str, Any]) -> None:
        """Change values of the loop's state in the checkpoint of `step`, if it is complete; never while writing.

        One process calls it. On a full disk the checkpoint stays as it is.
        """
        checkpoint = self._checkpoints.of(step)
        with suppress(OSError, ValueError):
            files, before = checkpoint.read()
            checkpoint.complete(files, before | state)
            self._checkpoints.retain(self._retention, step)

    def close(self) -> None:
        """End the thread, without waiting for the other processes, and free the copy that it wrote."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._host.close()

    def _completion(self, wait: bool) -> list[Saved]:
        """What became of a manifest, on the first process."""
        if self._completed is None or not (wait or self._completed.done()):
            return []
        error, self._completed = _reason(self._completed), None
        return [Saved(self._saving[0].step, error)] if error else []

    def _write(self, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
        """The work of the thread: this process's file, and a note of its size and hash."""
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError("weights or moments are not finite")
        self._before()
        path = checkpoint.folder / _name(self._engine.rank)
        with whole_file(path) as unfinished:
            write(unfinished, tensors)
        write_text(_note(path), json.dumps(File(path.stat().st_size, sha256_of(path))))

    def _complete(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        paths = [checkpoint.folder / _name(rank) for rank in range(self._engine.world_size)]
        files = {path.name: File(*json.loads(_note(path).read_text(encoding="utf-8"))) for path in paths}
        checkpoint.complete(files, state)
        for path in paths:
            _note(path).unlink()
        self._checkpoints.retain(self._retention, checkpoint.step)


def _name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _reason(future: Future) -> str:
    """Why a thread's work failed, in a line; empty if it did not."""
    error = future.exception()
    if error is None:
        return ""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
