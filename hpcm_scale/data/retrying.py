"""Trying again what a server may do the next time, and giving up in bounded time."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar

from hpcm_scale.config.urls import without_secrets
from hpcm_scale.errors import UserError

Result = TypeVar("Result")

GIVEN_UP_FOR = 60.0
"""Seconds for which a file that could not be read is not asked for again."""
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The last of a limit on the size of files."""
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}
"""Of botocore, which need not be installed."""


class Unreadable(OSError):
    """A file cannot be had now; the text says after how many tries and why."""


class Retrying:
    """Tries to read files, `tries` times each, with exponential back-off and jitter.

    Two rules keep a server that is down from costing all tries for every photo: a file that was given up is not asked
    for again for a minute, and right after a file was given up, another one is tried once.
    """

    def __init__(self, tries: int) -> None:
        self.tries = tries
        self._failing = False
        self._given_up: dict[str, tuple[float, str]] = {}
        """Until when, in seconds of the monotonic clock, and why."""

    def __call__(self, name: str, described: str, action: Callable[[], Result]) -> Result:
        """What `action` returns, which reads the file `name`.

        Raises `FileNotFoundError` and errors of a full disk as they come, `UserError` where credentials are missing,
        and `Unreadable` for all else that lasts.
        """
        until, reason = self._given_up.get(name, (0.0, ""))
        if time.monotonic() < until:
            raise Unreadable(reason)
        tries = 1 if self._failing else self.tries
        for attempt in count(1):
            try:
                result = action()
            except (UserError, FileNotFoundError):
                raise
            except Exception as error:  # every scheme raises kinds of its own
                if type(error).__name__ in NO_CREDENTIALS:
                    raise UserError(
                        f"there are no credentials for {described}; give them in the environment (AWS_ACCESS_KEY_ID "
                        "and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; FSSPEC_S3_ANON=true for a public bucket)"
                    ) from None
                if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
                    raise
                if attempt >= tries or is_permanent(error):
                    reason = self._give_up(name, attempt, error)
                    raise Unreadable(reason) from error
            else:
                self._failing = False
                return result
            time.sleep(pause(attempt))

    def _give_up(self, name: str, attempt: int, error: Exception) -> str:
        told = without_secrets(" ".join(f"{type(error).__name__} {error}".split()))
        reason = f"after {attempt} {'try' if attempt == 1 else 'tries'} ({told})"
        self._failing = True
        self._given_up[name] = (time.monotonic() + GIVEN_UP_FOR, reason)
        return reason


def is_permanent(error: Exception) -> bool:
    """Whether trying again is useless: a status 4xx of HTTP or S3, but for time-outs and too many requests."""
    if isinstance(error, TimeoutError):  # S3's RequestTimeout has status 400
        return False
    answer = getattr(error.__cause__, "response", None)  # botocore's, within what s3fs raises
    status = answer["ResponseMetadata"].get("HTTPStatusCode") if isinstance(answer, dict) else None
    status = getattr(error, "status", status)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)


def pause(attempt: int) -> float:
    """Seconds before the next try: 0.5, 1, 2 … 30, of which up to a half is taken off by chance."""
    return min(30.0, 0.5 * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
