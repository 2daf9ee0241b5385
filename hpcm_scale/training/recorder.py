"""Where a run's numbers go: the journal, wandb, the terminal. The first process records, others do not."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from hpcm_scale.config.compose import to_dict
from hpcm_scale.config.schema import Config
from hpcm_scale.data.photos import BadPhoto
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.estimate import Reconstruction
from hpcm_scale.tracking.journal import Journal
from hpcm_scale.tracking.progress import progress
from hpcm_scale.tracking.wandb_view import WandbView
from hpcm_scale.training.run_folder import RunFolder

# Means of the training metrics between two journal lines.


@dataclass
class Meter:
    """Sums of per-step values; skipped steps and those without a finite loss are left out of the means."""

    sums: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    skipped: int = 0

    def add(self, values: dict[str, float], skipped: bool) -> None:
        """The values of one step, already averaged over the processes."""
        self.skipped += skipped
        if skipped or not math.isfinite(values["loss"]):
            return
        self.steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def take(self, names: list[str]) -> dict[str, float | None]:
        """The means since the last call, None where there was no finite step; starts anew."""
        means = {name: self.sums[name] / self.steps if self.steps else None for name in names}
        means["skipped"] = self.skipped
        self.sums, self.steps, self.skipped = {}, 0, 0
        return means

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep: `Meter(**state)` goes on."""
        return asdict(self)


# The photos of the training set that turned out to be unreadable, counted by all processes alike.


class BadPhotos:
    """Each photo counts once, however often its turn comes; others took its place in the batches."""

    def __init__(self, reasons: Mapping[str, str] | None = None) -> None:
        self.reasons = dict(reasons or {})
        """By sample: why it could not be read; of the steps done, and so a checkpoint's."""
        self.ahead: dict[str, str] = {}
        """Those met first among the images of the next step."""

    def __len__(self) -> int:
        return len(self.reasons) + len(self.ahead)

    def told(self, photos: Iterable[BadPhoto]) -> str:
        """What a process tells the others of the photos it could not read; empty if it is nothing new."""
        new = {str(photo.sample): photo.reason for photo in photos if str(photo.sample) not in self.reasons}
        return json.dumps(new) if new else ""

    def add(self, texts: Sequence[str]) -> list[str]:
        """Take in what all processes told; returns a line for each photo that is new."""
        new: dict[str, str] = {}
        for text in filter(None, texts):
            new = json.loads(text) | new
        self.ahead = new
        return [f"left out: {new[sample]}" for sample in sorted(new, key=int)]

    def passed(self) -> None:
        """The next step is being done."""
        self.reasons |= self.ahead
        self.ahead = {}

    def too_many(self, limit: int) -> bool:
        """Whether they are more than `data.max_corrupt_samples` allows."""
        return len(self) > limit

    def error(self, limit: int) -> UserError:
        """What ends the run then."""
        first = next(iter((self.reasons | self.ahead).values()))
        return UserError(
            f"{len(self)} photos could not be read, more than data.max_corrupt_samples={limit} (the first: {first}); "
            "restore the shards (`hpcm shards verify` lists all damage), or raise data.max_corrupt_samples, and the "
            "same command goes on"
        )


class Recorder:
    """The recording of one run; on processes other than the first every call does nothing."""

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        *,
        first: bool,
        step: int,
        unevaluated: bool = False,
        facts: dict[str, Any],
    ) -> None:
        """What was recorded after `step`, and of it if it is `unevaluated` (`Journal.resume`), is dropped."""
        self._first = first
        if not first:
            return
        self._journal = Journal(folder.journal_file)
        self._journal.resume(step, unevaluated=unevaluated)
        self._wandb = WandbView.open(folder.path, config.log, config.run, config=to_dict(config), facts=facts)
        self._status: Callable[[], str] = str
        self._bar = progress(
            total=config.train.steps,
            initial=step,
            description=folder.path.name,
            unit="step",
            seconds=config.log.print_seconds,
            text=lambda: self._status(),
        )

    def line(self, record: dict[str, Any]) -> None:
        """Append one journal line; what cannot be written for want of space is kept for the next time."""
        if self._first:
            waiting = self._journal.waiting
            self._journal.append(record)
            if self._journal.waiting and not waiting:
                self.warn(f"{self._journal.path} cannot be written (the disk is full?); training goes on meanwhile")

    def advance(self, loss: float | None, status: Callable[[], str]) -> None:
        """One step more on the progress bar; `status` is asked for a line where there is none, if it is time for it."""
        if self._first:
            self._status = status
            self._bar.set_postfix_str("" if loss is None else f"loss {loss:.4f}", refresh=False)
            self._bar.update(1)

    def say(self, text: str) -> None:
        """One line on the terminal, beside the bar."""
        if self._first:
            self._bar.write(text)

    def warn(self, text: str) -> None:
        """Say aloud what went wrong though training goes on: also where nobody looks at the progress."""
        if self._first:
            self._bar.clear()
            sys.stderr.write(f"hpcm: {text}\n")
            sys.stderr.flush()

    def pictures(self, step: int, reconstructions: Sequence[Reconstruction]) -> None:
        """Show original and reconstruction side by side; before the evaluation's journal line."""
        if self._first and reconstructions:
            self._wandb.images(step, [_picture(item) for item in reconstructions])

    def sync(self) -> None:
        """What was recorded so far survives a power cut. Raises OSError if it cannot be made to."""
        if self._first:
            self._journal.sync()

    def close(self, exit_code: int = 0) -> None:
        """Let go of journal, wandb and terminal."""
        if self._first:
            self._bar.close()
            try:
                self._journal.close()
            except OSError as error:
                self.warn(f"the last lines of {self._journal.path} are lost ({error.strerror or error})")
            self._wandb.close(exit_code)


def _picture(item: Reconstruction) -> tuple[str, Any, str]:
    original, reconstruction, result = item
    caption = f"{result.name}: original, {result.bpp:.3f} bpp at {result.psnr:.2f} dB"
    wide = original.shape[1] < original.shape[2]  # put wide pictures above each other
    return result.name, torch.cat([original, reconstruction], dim=1 if wide else 2), caption
