"""Files from a shell command of the user's: whatever writes them to its standard output."""

from __future__ import annotations

import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from hpcm_scale.config.urls import PIPE
from hpcm_scale.data.retrying import Retrying
from hpcm_scale.errors import UserError

PLACE = "{}"
"""What the name of a file takes the place of in the command."""
LAST_WORDS = 1000
"""Bytes of the command's standard error that are kept."""


class PipeStorage:
    """Whole files, each the standard output of a shell command in which `{}` is replaced by the file's name.

    A command that fails, or writes nothing for `timeout` seconds, is run `retries` times in all.
    """

    def __init__(self, location: str, *, retries: int, timeout: float) -> None:
        self.command = location.removeprefix(PIPE)
        if PLACE not in self.command:
            raise UserError(f"the command of data.shards={PIPE}… has no {PLACE}, where the name of each file belongs")
        self.timeout = timeout
        self._retrying = Retrying(retries)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """A whole file. Raises `Unreadable`, and `UserError` for a part of a file."""
        if start or stop is not None:
            raise UserError(
                f"data.shards={PIPE}… gives whole shards, and data.cache cannot keep them; make room there, or name "
                "another folder"
            )

        def fetch() -> bytes:
            with BytesIO() as sink:
                self._run(name, sink)
                return sink.getvalue()

        return self._retrying(name, self.describe(name), fetch)

    def download(self, name: str, target: Path, check: Callable[[Path], None]) -> None:
        """Write a whole file to `target`; `check` raises `OSError` if what came is not right."""

        def fetch() -> None:
            with target.open("wb") as sink:
                self._run(name, sink)
            check(target)

        self._retrying(name, self.describe(name), fetch)

    def describe(self, name: str) -> str:
        return f"{name} from {PIPE}…"

    def renew(self, name: str) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""

    def _run(self, name: str, sink: BinaryIO) -> None:
        with _shell(self.command.replace(PLACE, shlex.quote(name))) as process:
            last_words = self._copy(process, sink)
            code = process.wait(self.timeout)
        if code:
            said = last_words.decode(errors="replace").strip().splitlines()
            raise OSError(f"exit code {code}" + (f": {said[-1]}" if said else ""))

    def _copy(self, process: subprocess.Popen, sink: BinaryIO) -> bytes:
        """Standard output to `sink`, up to its end; returns the end of standard error."""
        last_words = b""
        with selectors.DefaultSelector() as selector:
            for pipe in (process.stdout, process.stderr):
                selector.register(pipe, selectors.EVENT_READ)
            patience_ends = time.monotonic() + self.timeout
            while process.stdout in {key.fileobj for key in selector.get_map().values()}:
                ready = selector.select(max(0.0, patience_ends - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"the command wrote nothing for {self.timeout:g} seconds")
                for key, _ in ready:
                    block = os.read(key.fd, 1 << 20)
                    if not block:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is process.stdout:
                        sink.write(block)
                        patience_ends = time.monotonic() + self.timeout
                    else:
                        last_words = (last_words + block)[-LAST_WORDS:]
        return last_words


@contextmanager
def _shell(command: str):
    """A running shell, which is gone afterwards with all that it has started."""
    process = subprocess.Popen(
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.stderr.close()
        process.wait()
