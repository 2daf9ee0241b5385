"""The journal of a run: one JSON object a line, appended whole, readable while the run lives or is dead.

It is the truth about a run; wandb and the figures are views of it.
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
from hpcm_scale.files import whole_file

FILE_NAME = "metrics.jsonl"
REQUIRED = ("step", "time", "train/images", "compute/pflops")
"""On every line: optimizer step, seconds of training, images seen, cumulative model PFLOPs (1e15)."""


class Journal:
    """Appends records to `path` (`metrics.jsonl` in the run folder); only the first process holds one.

    Call `resume` before the first `append`, also when training starts from step 0.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = self._open()
        self._waiting: list[bytes] = []
        self._lock = Lock()  # a checkpoint's thread syncs what the training loop appends

    def append(self, record: dict[str, Any]) -> None:
        """Add one line. Numbers keep full precision (tensor and numpy scalars are taken as numbers);
        NaN and infinities become null. Where the disk is full, lines wait in memory and are tried again next time."""
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
        """Lines that could not be written yet."""
        return len(self._waiting)

    def _write_waiting(self) -> None:
        # One write of one line to a file opened with O_APPEND: a reader never sees lines mixed, and a
        # killed process leaves at most its last line torn.
        while self._waiting:
            end = os.fstat(self._descriptor).st_size
            if os.write(self._descriptor, self._waiting[0]) < len(self._waiting[0]):
                os.ftruncate(self._descriptor, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            del self._waiting[0]

    def resume(self, step: int, *, unevaluated: bool = False) -> None:
        """Go back to the checkpoint of `step`: drop a torn last line and every line of a later step.

        `unevaluated`: the checkpoint was written before the evaluation of its step, which is dropped, too.
        """
        with (
            whole_file(self.path) as unfinished,
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
        """Make all lines survive a power cut; called before a checkpoint is marked complete.

        Raises OSError if it cannot, for a full disk among other reasons.
        """
        with self._lock:
            self._write_waiting()
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Sync and close; the journal cannot be appended to afterwards. Raises OSError if lines are lost by that."""
        try:
            self.sync()
        finally:
            os.close(self._descriptor)

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a journal, in order; a torn last line of a living or dead run is left out.

    Raises UserError when there is no journal or a line is not a JSON object.
    """
    try:
        with Path(path).open("rb") as journal:
            return list(new_records(journal))
    except FileNotFoundError:
        raise UserError(f"there is no journal at {path}; name a run folder that holds {FILE_NAME}") from None


def new_records(journal: BinaryIO) -> Iterator[dict[str, Any]]:
    """Records from the current position of a journal opened for reading to its last whole line.

    Called again on the same file it goes on where it stopped: so a living journal is followed.
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
        place = f"{journal.name} before byte {journal.tell()}"
        raise UserError(f"{place} holds a line that is not JSON; remove the line") from None


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
