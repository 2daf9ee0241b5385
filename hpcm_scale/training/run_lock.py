"""One training at a time writes a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from hpcm_scale.errors import UserError
from hpcm_scale.files import writing

LOCK = ".lock"
"""The lock's file in the run folder."""
WAIT_SECONDS = 60.0
"""A launcher that was killed leaves processes that save a checkpoint before they end."""
_POLL_SECONDS = 0.2


class RunLock:
    """The lock on the run folder `path`, held until `release`, or until the process ends in whatever way.

    Waits `seconds` for a holder that is just ending. Raises UserError, naming the holder, if it does not end, and if
    the folder cannot be made.
    """

    def __init__(self, path: str | Path, seconds: float = WAIT_SECONDS) -> None:
        path = Path(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            self._file: TextIO | None = (path / LOCK).open("a+", encoding="utf-8")
        deadline = time.monotonic() + seconds
        told = False
        while not self._take():
            if time.monotonic() > deadline:
                holder = self._holder()
                self._file.close()
                raise UserError(f"{path} is being trained by {holder}; stop that, or choose another run.dir")
            if not told:
                print(f"{path} is still in use by {self._holder()}: waiting for it to end", flush=True)
                told = True
            time.sleep(_POLL_SECONDS)
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._file.flush()

    def release(self) -> None:
        """Let others write the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # else: a file system without locks
        return True

    def _holder(self) -> str:
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read())
            return f"process {holder['pid']} on {holder['host']}"
        except (ValueError, KeyError, TypeError):
            return "another process"
