"""What a user can do wrong, told in one sentence."""

from __future__ import annotations

import argparse
import codecs
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from io import BufferedWriter, FileIO, RawIOBase, TextIOWrapper
from pathlib import Path
from typing import NoReturn

# Standard output and error that take any text and outlive their readers, and names as text that any file can hold.


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


STOPPED = 75
"""Exit code of a run that was asked to stop and left a checkpoint: the same command goes on (EX_TEMPFAIL)."""


class UserError(Exception):
    """A mistake that the user can correct: one sentence with cause and remedy. Exit code 2.

    Every process raises the same one and rank 0 prints it, unless it is `local`.

    Args:
        code: short name of the mistake, such as "no-shards"; tests assert on it. tests/errors.txt lists all of them.
        key: configuration key, option or file that it is about; empty if there is none.
        sentence: cause and remedy.
    """

    local = False
    """Raised by this process, perhaps by no other: this process prints it."""
    exit_code = 2

    def __init__(self, *parts: str) -> None:
        self.code, self.key, sentence = parts if len(parts) == 3 else ("", "", *parts)
        super().__init__(sentence)


class Fault(UserError):
    """A process or a machine that failed: nobody's mistake, told in one sentence by the one process that raises it."""

    local = True
    exit_code = 1


def in_a_line(error: BaseException) -> str:
    """The reason of an error, never empty; of several lines, as torch has them, the first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_REFUSALS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def refusals(local: bool = False) -> Iterator[None]:
    """What the file system refuses in here becomes a `UserError`: a name, permissions, a full disk.

    Other errors of the system, such as a file that should be there, may be mistakes of this program: they stay.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _REFUSALS and error.filename is not None:
            place = error.filename
        elif error.errno in _FULL:
            place = error.filename or "the disk"
        else:
            raise
        refusal = UserError(f"cannot use {place} ({error.strerror}); mend that, or name another place")
        refusal.local = local
        raise refusal from error


def is_first_process() -> bool:
    """Whether this process is the one that speaks to the user (rank 0, or no launcher at all)."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Tell the user something in one line on stderr, whatever line breaks the names in it have."""
    sys.stderr.write(f"hpcm: {' '.join(text.split())}\n")


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are told in one line, too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def one_line(command: Callable[..., None]) -> Callable[..., None]:
    """What every command has in common: streams that take any text, and mistakes that are told in one line.

    A `UserError` becomes that line on stderr and its exit code. A command whose standard output is closed before all
    is written does all its work and ends with 1, as Python's documentation has it for a closed pipe.
    """

    @wraps(command)
    def wrapped(*arguments, **keywords) -> None:
        open_streams()
        try:
            with refusals():
                command(*arguments, **keywords)
        except UserError as error:
            if error.local or is_first_process():
                say(str(error))
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        lost = lost_output()
        if lost:
            say(f"cannot write to standard output ({lost})")
        if lost is not None:
            raise SystemExit(1)

    return wrapped
