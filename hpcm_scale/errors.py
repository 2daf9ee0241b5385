"""What a user can do wrong, told in one sentence."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps


class UserError(Exception):
    """A mistake the user can mend: its text is one sentence that names the cause and the mend.

    Every process meets the same one, and the first one tells it, unless it is `local`.
    """

    local = False
    """Met by this process, perhaps by no other: it must speak itself."""


def is_first_process() -> bool:
    """Whether this process is the one that speaks to the user (rank 0, or no launcher at all)."""
    return int(os.environ.get("RANK", "0")) == 0


def one_line(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a `UserError` of a command into one line on stderr and exit code 2."""

    @wraps(command)
    def wrapped(*arguments, **keywords) -> None:
        try:
            command(*arguments, **keywords)
        except UserError as error:
            if error.local or is_first_process():
                sys.stderr.write(f"hpcm: {' '.join(str(error).split())}\n")
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return wrapped
