"""The journal of a run: one JSON object per line, append-only, readable at any time.

It is the record of a run; wandb and the figures are views of it.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

from hpcm_scale.errors import UserError
from hpcm_scale.files import atomic_file

FILE_NAME = "metrics.jsonl"
REQUIRED = ("step", "time", "train/images", "compute/pflops")
"""Keys of every line: optimizer step, training seconds, images, cumulative model PFLOPs (1e15)."""


class Journal:
    """Appends records to `path` (`metrics.jsonl` in the run folder), on rank 0 only.

    Call `resume` before the first `append`, also when training starts from step 0.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = self._open()
        self._waiting: list[bytes] = []
        self._lock = Lock()  # a checkpoint's thread syncs what the training loop appends

    def append(self, record: dict[str, Any]) -> None:
        """Append one line.

        Numbers, also of tensor and numpy scalars, keep full precision; NaN and infinities become null. While the disk
        is full, lines are kept in memory and written at the next call.
        """
        missing = [key for key in REQUIRED if key not in record]
        assert not missing, f"a journal line needs {', '.join(missing)}"
        values = {key: _plain(value) for key, value in record.items()}
        line = json.dumps(values, allow_nan=False, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        with self._lock:
            self._waiting.append(line)
            with suppress(OSError):
                self._write_waiting()

    @property
    def waiting(self) -> int:
        """Number of lines that are not written yet."""
        return len(self._waiting)

    def _write_waiting(self) -> None:
        # One write per line to a file opened with O_APPEND: lines never mix, and a killed process leaves at most its
        # last line incomplete.
        while self._waiting:
            end = os.fstat(self._descriptor).st_size
            if os.write(self._descriptor, self._waiting[0]) < len(self._waiting[0]):
                os.ftruncate(self._descriptor, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            del self._waiting[0]

    def resume(self, step: int, *, unevaluated: bool = False) -> None:
        """Go back to the checkpoint of `step`: drop an incomplete last line and all lines of later steps.

        `unevaluated`: the checkpoint was written before the evaluation of its step, whose line is dropped, too.
        """
        with (
            atomic_file(self.path) as unfinished,
            unfinished.open("wb") as kept,
            self.path.open("rb") as journal,
        ):
            for line in _whole_lines(journal):
                record = _parsed(line, journal)
                if record["step"] < step or (record["step"] == step and not (unevaluated and "eval/loss" in record)):
                    kept.write(line)
        os.close(self._descriptor)
        self._descriptor = self._open()

    def sync(self) -> None:
        """Flush all lines to disk, before a checkpoint is marked complete. Raises OSError, e.g. for a full disk."""
        with self._lock:
            self._write_waiting()
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Sync and close. Raises OSError if lines are lost."""
        try:
            self.sync()
        finally:
            os.close(self._descriptor)

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """All complete lines of a journal, in order; an incomplete last line is ignored.

    Raises UserError if there is no journal or a line is not JSON.
    """
    try:
        with Path(path).open("rb") as journal:
            return list(new_records(journal))
    except FileNotFoundError:
        raise UserError(
            "no-journal", "", f"there is no journal at {path}; give a run folder with a {FILE_NAME}"
        ) from None


def new_records(journal: BinaryIO) -> Iterator[dict[str, Any]]:
    """Records from the current position of an open journal to its last complete line.

    Call it again to read the lines appended since. Raises UserError for a line that is not JSON.
    """
    for line in _whole_lines(journal):
        yield _parsed(line, journal)


def _whole_lines(journal: BinaryIO) -> Iterator[bytes]:
    while (line := journal.readline()).endswith(b"\n"):
        yield line
    journal.seek(-len(line), os.SEEK_CUR)


def _parsed(line: bytes, journal: BinaryIO) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        raise UserError(
            "damaged-journal",
            "",
            f"{journal.name} has a line before byte {journal.tell()} that is not JSON; remove the line",
        ) from None


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
