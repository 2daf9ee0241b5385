"""What a user can do wrong, told in one sentence."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import NoReturn

from hpcm_scale.streams import lost_output, open_streams

STOPPED = 75
"""Exit code of a run that was asked to stop and left a checkpoint: the same command goes on (EX_TEMPFAIL)."""


class UserError(Exception):
    """A mistake the user can mend: its text is one sentence that names the cause and the mend.

    Every process meets the same one, and the first one tells it, unless it is `local`.
    """

    local = False
    """Met by this process, perhaps by no other: it must speak itself."""
    exit_code = 2


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
