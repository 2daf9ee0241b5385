"""User errors with exit codes, and output streams that never fail."""

from __future__ import annotations

import argparse
import codecs
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from io import BufferedWriter, FileIO, RawIOBase, TextIOWrapper
from pathlib import Path
from typing import NoReturn

STOPPED = 75
"""Exit code of a run that wrote a checkpoint and stopped on request; the same command resumes it (EX_TEMPFAIL)."""


class UserError(Exception):
    """A mistake that the user can correct. Exit code 2.

    All ranks raise the same error and rank 0 prints it, unless it is `local`.

    Args:
        code: short name of the mistake, such as "no-shards"; tests assert on it. tests/errors.txt lists all of them.
        key: configuration key or command-line option that the error is about; empty if there is none.
        sentence: cause and remedy.
    """

    local = False
    """Raised by this rank, possibly by no other: this rank prints it."""
    exit_code = 2

    def __init__(self, code: str, key: str, sentence: str) -> None:
        super().__init__(code, key, sentence)
        self.code, self.key = code, key

    def __str__(self) -> str:
        return self.args[-1]


class Fault(UserError):
    """A failed process or node, which is not the user's mistake. Exit code 1. The raising rank prints it."""

    local = True
    exit_code = 1


def first_line(error: BaseException) -> str:
    """First line of an error's message, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS)
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def translate_os_errors(local: bool = False) -> Iterator[None]:
    """Raise UserError instead of OSError for bad file names, missing permissions and full disks.

    Other errors of the system, such as a missing file, may be bugs of this package: they pass unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _UNUSABLE and error.filename is not None:
            place = error.filename
        elif error.errno in _FULL:
            place = error.filename or "the disk"
        else:
            raise
        refusal = UserError(
            "unusable-path", "", f"cannot use {place} ({error.strerror}); correct the cause or choose another path"
        )
        refusal.local = local
        raise refusal from error


def is_first_process() -> bool:
    """Whether this process is rank 0, or runs without a launcher."""
    return int(os.environ.get("RANK", "0")) == 0


def print_message(text: str) -> None:
    """Print one line to stderr; line breaks in `text`, for example in file names, become spaces."""
    sys.stderr.write(f"hpcm: {' '.join(text.split())}\n")


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError, so that mistakes take one line."""

    def error(self: argparse.ArgumentParser, message: str) -> NoReturn:
        option = re.search(r"--[a-z][\w-]*", message)
        raise UserError("bad-arguments", option[0] if option else "", f"{message}; see {self.prog} --help")


def entry_point(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator of every command: prints a `UserError` in one line on stderr and exits with its code.

    A command whose standard output is closed early still does all its work, and exits with code 1.
    """

    @wraps(command)
    def wrapped(*arguments, **keywords) -> None:
        open_streams()
        try:
            with translate_os_errors():
                command(*arguments, **keywords)
        except UserError as error:
            if error.local or is_first_process():
                print_message(str(error))
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        lost = lost_output()
        if lost:
            print_message(f"cannot write to standard output ({lost})")
        if lost is not None:
            raise SystemExit(1)

    return wrapped


# Output: text that no encoding refuses, streams that never raise.

ESCAPE = "hpcm_scale.escape"
"""Error handler, for `open` and `str.encode`, that escapes characters the encoding lacks."""


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    # Python represents a byte of a file name that is not UTF-8 as a surrogate, U+DC80 to U+DCFF.
    escaped = [
        rf"\x{ord(character) - 0xDC00:02x}" if "\udc80" <= character <= "\udcff" else ascii(character)[1:-1]
        for character in error.object[error.start : error.end]
    ]
    return "".join(escaped), error.end


codecs.register_error(ESCAPE, _escape)


def printable(name: object) -> str:
    r"""`name` as text that can be printed and written as UTF-8; other bytes are escaped as `\xe9`."""
    return str(name).encode("utf-8", ESCAPE).decode()


class _Stream(FileIO):
    """A file that drops text it cannot write: the reader of a pipe has ended, or the disk is full."""

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
    """Make stdout and stderr of this process accept any text in any locale and never raise OSError."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before this process started
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _tolerant(stream))
        elif isinstance(stream, TextIOWrapper):  # replaced, for example by a test
            stream.reconfigure(errors=ESCAPE)


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
        ESCAPE,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def lost_output() -> str | None:
    """Why text for stdout was dropped since the last call; "" if its reader has ended, None if nothing was dropped."""
    sys.stdout.flush()
    if _output is None or _output.refused is None:
        return None
    refused, _output.refused = _output.refused, None
    return "" if refused.errno == errno.EPIPE else refused.strerror


@contextmanager
def ignore_lost_output() -> Iterator[None]:
    """Make the exit code independent of whether stdout could be written."""
    yield
    lost_output()
