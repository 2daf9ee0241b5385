"""What a user can do wrong, told in one sentence."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import NoReturn

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


@contextmanager
def alone() -> Iterator[None]:
    """What is done in here may fail on this process and on no other: its `UserError` is `local`."""
    try:
        yield
    except UserError as error:
        error.local = True
        raise


def is_first_process() -> bool:
    """Whether this process is the one that speaks to the user (rank 0, or no launcher at all)."""
    return int(os.environ.get("RANK", "0")) == 0


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are told in one line, too."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def one_line(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a `UserError` of a command into one line on stderr and its exit code."""

    @wraps(command)
    def wrapped(*arguments, **keywords) -> None:
        try:
            command(*arguments, **keywords)
        except UserError as error:
            if error.local or is_first_process():
                sys.stderr.write(f"hpcm: {' '.join(str(error).split())}\n")
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return wrapped
