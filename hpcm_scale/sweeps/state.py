"""How far a run is, from what lies in and beside its folder: journal, configuration, log."""

from __future__ import annotations

import os
import time
from array import array
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from hpcm_scale.errors import UserError
from hpcm_scale.scaling.filters import smoothed
from hpcm_scale.scaling.runs import CONFIG_NAME
from hpcm_scale.sweeps.jobs import Planned, last_error, last_mark, lives, log_of, planned, tail
from hpcm_scale.tracking import journal

QUIET_SECONDS = 120.0
"""A run whose files have not changed for so long, and for four times as long as lately between two lines of its
journal, is taken to have stopped where its processes cannot be looked up: it may run on another machine."""
RECENT = 20
"""Journal lines that the speed is taken from."""


MEASURES = ("loss", "bpp", "psnr")
_TRAINING = ("train/learning_rate", *(f"train/{key}" for key in MEASURES))


@dataclass(frozen=True)
class RunState:
    """One line of the table."""

    name: str
    folder: Path
    plan: Planned | None
    """None: nothing readable says what the run is."""
    state: str
    """waiting, running, finished, stopped, failed; or, as a launcher knows better, stopping."""
    note: str = ""
    """Why, where it failed; where to read more."""
    step: int = 0
    loss: float | None = None
    bpp: float | None = None
    """Bits per pixel."""
    psnr: float | None = None
    """dB."""
    evaluated: bool = False
    """Whether loss, bpp and PSNR are of the newest evaluation, or else the ends of the smoothed training curves."""
    pflops: float | None = None
    """Training compute so far, 1e15 FLOP."""
    seconds: float | None = None
    """Training time so far."""
    seconds_left: float | None = None


class Follower:
    """Reads a run's journal as it grows; `look` tells how far it is now."""

    def __init__(self, folder: Path, plan: Planned | None = None) -> None:
        self.folder = folder
        self._plan = plan
        self._config_time = 0
        self._journal: BinaryIO | None = None
        self._forget()

    def look(self) -> RunState:
        """The run's state now. A journal that is damaged is no obstacle: the note tells of it."""
        self._read_config()
        self._read_journal()
        note = self._damage
        log = tail(log_of(self.folder))
        state = self._state(log)
        if state == "failed":
            note = f"{last_error(log)} (log: {log_of(self.folder)})"
        measured = {key: self._evaluation.get(f"eval/{key}") for key in MEASURES} if self._evaluation else self._ends()
        step, seconds = (self._last.get(key) for key in ("step", "time"))
        return RunState(
            name=self.folder.name,
            folder=self.folder,
            plan=self._plan,
            state=state,
            note=note,
            step=step or 0,
            **measured,
            evaluated=bool(self._evaluation),
            pflops=self._last.get("compute/pflops"),
            seconds=seconds,
            seconds_left=self._seconds_left() if state == "running" else None,
        )

    def _forget(self) -> None:
        self._damage = ""
        self._last: dict[str, Any] = {}
        self._training = {key: array("d") for key in ("compute/pflops", *_TRAINING)}
        self._evaluation: dict[str, Any] = {}
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)

    def _read_config(self) -> None:
        file = self.folder / CONFIG_NAME
        changed = _changed(file)
        if changed in (None, self._config_time):
            return
        try:
            self._plan = planned(OmegaConf.to_container(OmegaConf.load(file)))
            self._config_time = changed
        except (YAMLError, OmegaConfBaseException, OSError, KeyError, TypeError, ValueError):
            return  # half gone, or no run's

    def _read_journal(self) -> None:
        """Take in what has been added; a resumed run replaces its journal by a shorter one, read from its start."""
        file = self.folder / journal.FILE_NAME
        try:
            if self._journal and not _same(file, self._journal):
                self._journal.close()
                self._journal = None
                self._forget()
            self._journal = self._journal or file.open("rb")
            for record in journal.new_records(self._journal):
                self._take(record)
        except OSError:
            return  # not there yet
        except UserError as error:
            self._damage = str(error)
        except (AttributeError, KeyError):
            self._damage = f"{file} holds a line that is not a run's; remove the line"

    def _take(self, record: dict[str, Any]) -> None:
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        self._recent.append((numbers["step"], numbers["time"]))
        self._last = numbers
        if "eval/loss" in numbers:
            self._evaluation = numbers
        elif "train/loss" in numbers:
            before = self._training["compute/pflops"]
            if numbers["compute/pflops"] > (before[-1] if before else 0):  # as in every journal of one run
                for key, values in self._training.items():
                    values.append(numbers.get(key, np.nan))

    def _ends(self) -> dict[str, float | None]:
        """Where the smoothed training curves end; a single batch says little."""
        pflops, rates, *measures = (np.array(values) for values in self._training.values())

        def end(values: np.ndarray) -> float | None:
            known = np.isfinite(values)
            return float(smoothed(pflops[known], values[known], rates[known])[-1]) if known.any() else None

        return dict(zip(MEASURES, map(end, measures), strict=True))

    def _seconds_left(self) -> float | None:
        if len(self._recent) < 2 or self._plan is None:
            return None
        (first, began), (last, ended) = self._recent[0], self._recent[-1]
        return (self._plan.steps - last) * (ended - began) / (last - first) if last > first else None

    def _state(self, log: str) -> str:
        mark = last_mark(log)
        if lives(mark):
            return "running"
        written, logged = (_changed(path) or 0 for path in (self._journal_file, log_of(self.folder)))
        ended = mark is not None and mark.kind == "ended" and logged >= written
        if ended and mark.failed:
            return "failed"  # even with all steps done: the last evaluation, checkpoint or export may be missing
        if self._plan and self._last and self._last["step"] >= self._plan.steps:
            return "finished"
        here = mark is not None and mark.group is not None  # its processes were looked for, and there are none
        begun = self.folder.is_dir()
        waiting = mark is not None and mark.kind == "submitted" and logged >= written
        if begun and not (ended or here or waiting) and self._lately(max(written, logged)):
            return "running"
        return "stopped" if begun and not waiting else "waiting"

    @property
    def _journal_file(self) -> Path:
        return self.folder / journal.FILE_NAME

    def _lately(self, nanoseconds: int) -> bool:
        times = [seconds for _, seconds in self._recent]
        longest = max((after - before for before, after in pairwise(times)), default=0.0)
        newest = nanoseconds or _changed(self.folder / CONFIG_NAME) or 0
        return time.time() - newest / 1e9 < max(QUIET_SECONDS, 4 * longest)


def _changed(path: Path) -> int | None:
    """When a file was last written, nanoseconds since 1970; None if there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _same(path: Path, opened: BinaryIO) -> bool:
    there, here = path.stat(), os.fstat(opened.fileno())
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
