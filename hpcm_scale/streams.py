"""Standard output and error that take any text and outlive their readers, and names as text that any file can hold."""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter, FileIO, RawIOBase, TextIOWrapper
from pathlib import Path

SHOWN = "hpcm_scale.shown"
"""The error handler for text that may hold names of files: for `open`, `str.encode` and the like."""


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    hard = error.object[error.start : error.end]
    # Python keeps a byte of a name that is not UTF-8 as a surrogate, U+DC80 to U+DCFF.
    escaped = [rf"\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else ascii(c)[1:-1] for c in hard]
    return "".join(escaped), error.end


codecs.register_error(SHOWN, _escape)


def shown(name: object) -> str:
    r"""Text with names in it so that it can be printed, drawn and written: bytes that are not UTF-8 as `\xe9`."""
    return str(name).encode("utf-8", SHOWN).decode()


class _Stream(FileIO):
    """Text that cannot be written is dropped: the reader of a pipe has ended, or the disk of a log is full."""

    refused: OSError | None = None
    """Why text was dropped."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.refused = error
            return memoryview(data).nbytes


_output: _Stream | None = None


def open_streams() -> None:
    """Make this process's standard output and error take any text, whatever the locale, and never raise OSError."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before this process began
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _tolerant(stream))
        elif isinstance(stream, TextIOWrapper):  # somebody else's, such as a test's
            stream.reconfigure(errors=SHOWN)


def _tolerant(stream: TextIOWrapper) -> TextIOWrapper:
    global _output
    stream.flush()
    raw = _Stream(stream.fileno(), "w", closefd=False)
    raw.name = stream.name
    if stream is sys.__stdout__:
        _output = raw
    unbuffered = isinstance(stream.buffer, RawIOBase)  # python -u
    return TextIOWrapper(
        raw if unbuffered else BufferedWriter(raw),
        stream.encoding,
        SHOWN,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def lost_output() -> str | None:
    """Why text for standard output was dropped since the last call; "" if only its reader has ended."""
    sys.stdout.flush()
    refused = _output and _output.refused
    if not refused:
        return None
    _output.refused = None
    return "" if refused.errno == errno.EPIPE else refused.strerror


@contextmanager
def unread() -> Iterator[None]:
    """The exit code of what is done in here does not depend on whether its standard output could be written."""
    yield
    lost_output()
