"""Writes checkpoints while training goes on: training waits for the copy off the device only."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpcm_scale.files import sha256_of, whole_file, write_text
from hpcm_scale.training.checkpoints import Checkpoint, Checkpoints, File, Retention
from hpcm_scale.training.engine import Engine
from hpcm_scale.training.pieces import HostCopy, Piece, share, write


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
