"""Resumable checkpoints, written in the background: folders that are valid once their manifest is written."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpcm_scale.config.schema import TrainConfig
from hpcm_scale.errors import UserError
from hpcm_scale.files import atomic_file, sha256_of, sync_folder, write_text
from hpcm_scale.training.engines.base import Engine
from hpcm_scale.training.state_shards import HostCopy, StateShard, partition, write

_MANIFEST = "complete.json"
_FOLDER = re.compile(r"step_\d{8,}")  # does not match copies made by hand


class File(NamedTuple):
    """A manifest's entry of a file."""

    bytes: int
    sha256: str


class Checkpoint:
    """One folder, such as `step_00000040`, whose manifest is written after all other files.

    The manifest holds size and hash of every file, the state of the loop, and a hash of itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = folder / _MANIFEST

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.folder.name.removeprefix("step_"))

    def read(self) -> tuple[dict[str, File], dict[str, Any]]:
        """Files and state of the loop, from the manifest. Raises ValueError if it is damaged."""
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
            files, state = content["files"], content["state"]
            if content["sha256"] != _digest(files, state):
                raise ValueError
            return {name: File(*entry) for name, entry in files.items()}, state
        except (ValueError, KeyError, TypeError, OSError):
            raise ValueError(f"{_MANIFEST} is damaged or of another version") from None

    @property
    def evaluation(self) -> float | None:
        """Evaluation loss at its step; None without an evaluation or a readable manifest."""
        try:
            return self.read()[1].get("evaluation")
        except ValueError:
            return None

    def complete(self, files: dict[str, File], state: dict[str, Any]) -> None:
        """Write the manifest, which makes the checkpoint valid."""
        content = {"sha256": _digest(files, state), "files": files, "state": state}
        write_text(self.manifest, json.dumps(content, indent=1))
        sync_folder(self.folder.parent)

    def flaw(self, *, hashes: bool = False, rank: int = 0, world_size: int = 1) -> str:
        """The first missing or damaged file, "" if there is none; compares sizes.

        With `hashes` each of `world_size` ranks also compares the hashes of its share of the files.
        """
        try:
            files, _ = self.read()
        except ValueError as error:
            return str(error)
        for number, (name, expected) in enumerate(sorted(files.items())):
            path = self.folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected.bytes:
                return f"{name} has {path.stat().st_size} bytes instead of {expected.bytes}"
            if hashes and number % world_size == rank and sha256_of(path) != expected.sha256:
                return f"{name} is damaged"
        return ""

    def remove(self) -> None:
        """Delete it, the manifest first, so that an interrupted removal leaves no valid checkpoint."""
        self.manifest.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


class Choice(NamedTuple):
    """The checkpoint to resume from."""

    checkpoint: Checkpoint
    state: dict[str, Any]
    """State of the loop."""
    damaged: list[str]
    """Newer checkpoints that are damaged, and how."""


Examine = Callable[[Checkpoint], str]
"""Returns how a checkpoint is damaged; "" if it is not."""


class Checkpoints:
    """The folder `checkpoints/` of a run."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def complete(self) -> list[Checkpoint]:
        """Checkpoints with a manifest, oldest first."""
        return [checkpoint for checkpoint in self._begun() if checkpoint.manifest.is_file()]

    def newest(self, examine: Examine = Checkpoint.flaw) -> Choice | None:
        """The newest undamaged checkpoint, None if there are no checkpoints.

        Raises UserError if every checkpoint is damaged; never restarts from scratch.
        """
        damaged = []
        for checkpoint in reversed(self.complete()):
            flaw = examine(checkpoint)
            if not flaw:
                return Choice(checkpoint, checkpoint.read()[1], damaged)
            damaged.append(f"{checkpoint.folder}: {flaw}")
        if damaged:
            raise UserError(
                "no-valid-checkpoint",
                "run.dir",
                f"every checkpoint is damaged ({'; '.join(damaged)}); remove {self.folder} to start again",
            )
        return None

    def at(self, step: int, examine: Examine = Checkpoint.flaw) -> Choice | None:
        """The complete checkpoint of `step`. Raises UserError if it is damaged."""
        checkpoint = self.of(step)
        if not checkpoint.manifest.is_file():
            return None
        flaw = examine(checkpoint)
        if flaw:
            raise UserError(
                "damaged-checkpoint", "", f"{checkpoint.folder} cannot be used ({flaw}); choose another step"
            )
        return Choice(checkpoint, checkpoint.read()[1], [])

    def steps(self) -> list[int]:
        """Steps with complete checkpoints, ascending."""
        return [checkpoint.step for checkpoint in self.complete()]

    def reached(self) -> int:
        """Step of the newest complete checkpoint, 0 if there is none."""
        return max(self.steps(), default=0)

    def of(self, step: int) -> Checkpoint:
        """The checkpoint of `step`, which need not exist."""
        return Checkpoint(self.folder / f"step_{step:08d}")

    def retain(self, train: TrainConfig, newest: int) -> None:
        """Remove checkpoints that `train.keep_…` does not name, incomplete ones, and damaged ones: after `newest`."""
        losses = {checkpoint.step: checkpoint.evaluation for checkpoint in self.complete() if checkpoint.step <= newest}
        kept = {*sorted(losses)[-train.keep_checkpoints :], *train.keep_at}
        kept |= {step for step in losses if train.keep_every and step and step % train.keep_every == 0}
        evaluated = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
        if train.keep_best and evaluated:
            kept.add(min(evaluated, key=evaluated.__getitem__))
        for checkpoint in self._begun():
            if checkpoint.step not in kept or checkpoint.step > newest:
                checkpoint.remove()

    def _begun(self) -> list[Checkpoint]:
        """Complete and incomplete checkpoints, oldest first."""
        found = [Checkpoint(folder) for folder in self.folder.glob("step_*") if _FOLDER.fullmatch(folder.name)]
        return sorted(found, key=lambda checkpoint: checkpoint.step)


def _digest(files: dict[str, Any], state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([files, state], sort_keys=True).encode()).hexdigest()


class FailedSave(NamedTuple):
    """A checkpoint that could not be written."""

    step: int
    error: str


class Saver:
    """Writes one rank's part of each checkpoint in a thread; training only waits for the copy off the device.

    Every rank writes a file of its own. Its `flags` are all-reduced with the metrics of each step, and once all files
    are written (`commit`) rank 0 writes the manifest, also in its thread. So no thread communicates between ranks.
    """

    def __init__(
        self,
        engine: Engine,
        checkpoints: Checkpoints,
        train: TrainConfig,
        before: Callable[[], None],
        extra: Sequence[StateShard] = (),
    ) -> None:
        """`train.keep_…`: which checkpoints are kept.

        `before` flushes the journal, which must be as durable as the checkpoint, or raises OSError. `extra`: EMA
        shards, which are saved with the engine's and sharded alike.
        """
        self._engine = engine
        self._checkpoints = checkpoints
        self._train = train
        self._before = before
        self._extra = extra
        self._host = HostCopy(pin=engine.device.type == "cuda")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: tuple[Checkpoint, dict[str, Any]] | None = None
        self._written: Future | None = None
        self._completed: Future | None = None

    def begin(self, state: dict[str, Any]) -> list[FailedSave]:
        """Copy the state and start to write it; returns earlier checkpoints that failed. Called by all ranks.

        `state`: state of the loop, JSON values, the same on all ranks.
        """
        failed = self.finish()
        engine, checkpoint = self._engine, self._checkpoints.of(state["step"])
        if engine.rank == 0:
            with suppress(OSError):  # the thread gets and reports the same error
                checkpoint.remove()  # left by an interrupted save
                checkpoint.folder.mkdir(parents=True, exist_ok=True)
        engine.barrier()
        shards = [*engine.state_shards(), *self._extra]
        if engine.replicated:
            shards = partition(shards, engine.rank, engine.world_size)
        tensors = self._host.copy(shards)
        self._saving = checkpoint, state | {"updates": engine.updates}
        self._written = self._thread.submit(self._write, checkpoint, tensors)
        return failed

    def flags(self) -> tuple[float, float]:
        """Whether this rank has written its file, and whether it failed to; to be summed over all ranks."""
        if self._written is None or not self._written.done():
            return 0.0, 0.0
        failed = self._written.exception() is not None
        return float(not failed), float(failed)

    def commit(self, written: float, failed: float) -> list[FailedSave]:
        """Complete or discard a checkpoint once all ranks have finished; returns those that failed.

        `written` and `failed` are the summed `flags`. Called by all ranks with the same result, except that only rank
        0 reports a failed manifest.
        """
        ended = self._completion(wait=False)
        if self._saving is None or self._written is None or written + failed < self._engine.world_size:
            return ended
        checkpoint, state = self._saving
        if failed:
            reasons = self._engine.gather(_reason(self._written))
            if self._engine.rank == 0:
                checkpoint.remove()  # frees space
            ended.append(FailedSave(checkpoint.step, next(filter(None, reasons))))
        else:
            files = dict(self._engine.gather(self._written.result()))
            if self._engine.rank == 0:
                self._completed = self._thread.submit(self._complete, checkpoint, files, state)
        self._written = None
        return ended

    def finish(self) -> list[FailedSave]:
        """Wait for the checkpoint being written; returns it if it failed. Called by all ranks with the same result."""
        ended: list[FailedSave] = []
        if self._written is not None:
            self._written.exception()  # waits
            ended += self.commit(*self._engine.reduce(torch.tensor(self.flags())).tolist())
        ended += self._completion(wait=True)
        step = self._saving[0].step if self._saving else 0
        error = self._engine.gather(next((failed.error for failed in ended), ""))[0]
        return [FailedSave(step, error)] if error else []

    def amend(self, step: int, state: dict[str, Any]) -> None:
        """Change values of the loop's state in the complete checkpoint of `step`, while none is being written.

        Called by one rank. On a full disk the checkpoint is unchanged.
        """
        checkpoint = self._checkpoints.of(step)
        with suppress(OSError, ValueError):
            files, before = checkpoint.read()
            checkpoint.complete(files, before | state)
            self._checkpoints.retain(self._train, step)

    def close(self) -> None:
        """End the thread and free the host copy, without waiting for other ranks."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._host.close()

    def _completion(self, wait: bool) -> list[FailedSave]:
        """The checkpoint whose manifest rank 0 failed to write."""
        if self._completed is None or not (wait or self._completed.done()):
            return []
        error, self._completed = _reason(self._completed), None
        return [FailedSave(self._saving[0].step, error)] if error and self._saving else []

    def _write(self, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> tuple[str, File]:
        """Write this rank's file, in the thread; its entry in the manifest."""
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError("weights or moments are not finite")
        self._before()
        path = checkpoint.folder / f"rank_{self._engine.rank:05d}.safetensors"
        with atomic_file(path) as unfinished:
            write(unfinished, tensors)
        return path.name, File(path.stat().st_size, sha256_of(path))

    def _complete(self, checkpoint: Checkpoint, files: dict[str, File], state: dict[str, Any]) -> None:
        checkpoint.complete(files, state)
        self._checkpoints.retain(self._train, checkpoint.step)


def _reason(future: Future) -> str:
    """Why a thread's work failed, in one line; "" if it did not."""
    error = future.exception()
    if error is None:
        return ""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())
