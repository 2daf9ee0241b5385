"""Metrics of a run: means, counts of corrupt images, and their output to journal, wandb and terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from hpcm_scale.config.schema import LogConfig, RunConfig
from hpcm_scale.data.samples import CorruptSample
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.estimate import Reconstruction
from hpcm_scale.tracking.journal import Journal
from hpcm_scale.tracking.progress import progress
from hpcm_scale.tracking.wandb_view import WandbView
from hpcm_scale.training.run_folder import RunFolder


class StepMetrics(NamedTuple):
    """Metrics all-reduced once per step; sums over the processes unless stated otherwise."""

    means: dict[str, float]
    """Loss and its parts, means over the batch."""
    grad_norm: float
    """Norm of the gradients before clipping; NaN if the engine computes it within the step."""
    upscaled: float
    """Images smaller than the crop."""
    corrupt: float
    """Corrupt images among those of the next step."""
    without_data: float
    """Processes that have no images for the next step."""
    stopping: float
    """Processes that have received a stop request."""
    written: float
    """Processes that have written their file of the checkpoint."""
    unwritten: float
    """Processes that failed to."""


@dataclass
class Meter:
    """Means of metrics between two journal lines, without skipped steps and those whose loss is not finite."""

    sums: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    skipped: int = 0

    def add(self, values: dict[str, float], skipped: bool) -> None:
        """Add the values of one step, means over the processes."""
        self.skipped += skipped
        if skipped or not math.isfinite(values["loss"]):
            return
        self.steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take(self, names: list[str]) -> dict[str, float | None]:
        """The means since the last call, None if there was no finite step; resets them."""
        means = {name: self.sums[name] / self.steps if self.steps else None for name in names}
        means["skipped"] = self.skipped
        self.sums, self.steps, self.skipped = {}, 0, 0
        return means


class CorruptImages:
    """The corrupt images of the training set, counted once each, the same on all processes."""

    def __init__(self, reasons: Mapping[str, str] | None = None) -> None:
        self.reasons = dict(reasons or {})
        """Why a sample could not be read, by sample; in the steps done, and so part of a checkpoint."""
        self.ahead: dict[str, str] = {}
        """Those found among the images of the next step."""

    def __len__(self) -> int:
        return len(self.reasons) + len(self.ahead)

    def new(self, samples: Iterable[CorruptSample]) -> dict[str, str]:
        """The reasons of those samples that this process has not counted, by sample."""
        return {str(sample.sample): sample.reason for sample in samples if str(sample.sample) not in self.reasons}

    def add(self, found: Sequence[dict[str, str]]) -> list[str]:
        """Add the results of `new` of all processes; returns a line for each image."""
        new: dict[str, str] = {}
        for reasons in found:
            new = reasons | new
        self.ahead = new
        return [f"skipped: {new[sample]}" for sample in sorted(new, key=int)]

    def advance(self) -> None:
        """Count the images ahead as those of a step done."""
        self.reasons |= self.ahead
        self.ahead = {}

    def check(self, limit: int) -> None:
        """Raise UserError if they are more than `limit`, data.max_corrupt_samples."""
        if len(self) > limit:
            first = next(iter((self.reasons | self.ahead).values()))
            raise UserError(
                "too-many-corrupt-samples",
                "data.max_corrupt_samples",
                f"{len(self)} images are corrupt, more than data.max_corrupt_samples={limit} (the first: {first}); "
                "restore the shards (`hpcm shards verify` lists all damage), or raise the limit, and the same "
                "command resumes the run",
            )


class Recorder:
    """Output of one run to journal, wandb and terminal; only rank 0 writes, elsewhere every call does nothing."""

    def __init__(
        self,
        folder: RunFolder,
        log: LogConfig,
        run: RunConfig,
        settings: dict[str, Any],
        *,
        steps: int,
        first: bool,
        step: int,
        unevaluated: bool = False,
        facts: dict[str, Any],
    ) -> None:
        """Journal lines after `step`, and its evaluation if that is `unevaluated`, are dropped (`Journal.resume`).

        `settings`: the configuration; `steps`: those of the schedule; `facts`: metadata for wandb.
        """
        self._first = first
        if not first:
            return
        self._journal = Journal(folder.journal_file)
        self._journal.resume(step, unevaluated=unevaluated)
        self._wandb = WandbView(folder.path, log, run, config=settings, metadata=facts)
        self._status: Callable[[], str] = str
        self._bar = progress(
            total=steps,
            initial=step,
            description=folder.path.name,
            unit="step",
            seconds=log.print_seconds,
            text=lambda: self._status(),
        )

    def line(self, record: dict[str, Any]) -> None:
        """Append one journal line; on a full disk it is kept in memory and written later."""
        if self._first:
            waiting = self._journal.waiting
            self._journal.append(record)
            if self._journal.waiting and not waiting:
                self.warn(f"{self._journal.path} cannot be written (the disk is full?); training continues")

    def advance(self, loss: float | None, status: Callable[[], str]) -> None:
        """Advance the progress bar; without a terminal, `status` gives the progress line when one is due."""
        if self._first:
            self._status = status
            self._bar.set_postfix_str("" if loss is None else f"loss {loss:.4f}", refresh=False)
            self._bar.update(1)

    def print(self, text: str) -> None:
        """Print one line above the progress bar."""
        if self._first:
            self._bar.write(text)

    def warn(self, text: str) -> None:
        """Print a warning on stderr."""
        if self._first:
            self._bar.clear()
            sys.stderr.write(f"hpcm: {text}\n")
            sys.stderr.flush()

    def images(self, step: int, reconstructions: Sequence[Reconstruction]) -> None:
        """Log originals beside reconstructions to wandb; call it before `line` for the same evaluation."""
        if self._first and reconstructions:
            self._wandb.images(step, [_side_by_side(item) for item in reconstructions])

    def sync(self) -> None:
        """Flush the journal to disk. Raises OSError if that fails."""
        if self._first:
            self._journal.sync()

    def close(self, exit_code: int = 0) -> None:
        """Close journal, wandb and progress bar."""
        if self._first:
            self._bar.close()
            try:
                self._journal.close()
            except OSError as error:
                self.warn(f"the last lines of {self._journal.path} are lost ({error.strerror or error})")
            self._wandb.close(exit_code)


def _side_by_side(item: Reconstruction) -> tuple[str, Any, str]:
    original, reconstruction, result = item
    caption = f"{result.name}: original, {result.bpp:.3f} bpp at {result.psnr:.2f} dB"
    wide = original.shape[1] < original.shape[2]  # wide images above each other
    return result.name, torch.cat([original, reconstruction], dim=1 if wide else 2), caption
