"""Reading byte ranges of shards: from a folder, from a URL, or from a shell command."""

from __future__ import annotations

import errno
import gc
import os
import random
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar
from weakref import WeakSet

import aiohttp
import fsspec
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem

from hpcm_scale.errors import UserError
from hpcm_scale.files import PIPE, check_no_secret, without_secrets

# Trying again what a server may do the next time, and giving up in bounded time.


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


# Files from a shell command of the user's: whatever writes them to its standard output.


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


class LocalStorage:
    """A folder on this machine."""

    OPEN_FILES = 128
    """Handles kept open, least recently used closed first: a large set has more shards than that. All storages of a
    process share them."""
    _all: ClassVar[WeakSet[LocalStorage]] = WeakSet()

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._handles: dict[str, BinaryIO] = {}
        self._all.add(self)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start … stop − 1 of a file, fewer if it ends before. Raises `OSError`."""
        handle = self._handles.pop(name, None) or (self.folder / name).open("rb", buffering=0)
        self._handles[name] = handle
        while len(self._handles) > max(1, self.OPEN_FILES // len(self._all)):
            self._handles.pop(next(iter(self._handles))).close()
        size = os.fstat(handle.fileno()).st_size  # memory is taken for what is there, not for what is asked for
        stop = size if stop is None else min(stop, size)
        return os.pread(handle.fileno(), max(0, stop - start), start)

    def describe(self, name: str) -> str:
        return str(self.folder / name)

    def renew(self, name: str) -> None:
        """Open the file anew for the next read: another may have taken its place."""
        if name in self._handles:
            self._handles.pop(name).close()

    def close(self) -> None:
        while self._handles:
            self._handles.popitem()[1].close()


class RemoteStorage:
    """A folder behind a URL: http(s) by range requests, other schemes by their fsspec packages.

    A read that fails is tried `retries` times in all, unless the server says that it will never succeed. `timeout` is
    in seconds per read. Credentials and endpoints are those of the environment.
    """

    def __init__(self, url: str, *, retries: int, timeout: float) -> None:
        check_no_secret(url, "the URL of the shards")
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._retrying = Retrying(retries)
        try:
            self.files, self.root = fsspec.core.url_to_fs(self.url, **options(self.url, timeout))
        except (ValueError, ImportError) as error:
            raise UserError(f"cannot read {url}: {error}") from None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start … stop − 1 of a file. Raises `FileNotFoundError`, `Unreadable`, or `UserError` for what no
        other file would mend."""

        def fetch() -> bytes:
            data = self._fetch(name, start, stop)
            if stop is not None and len(data) > stop - start:
                raise UserError(
                    f"the server of {self.describe(name)} ignores range requests; "
                    "set data.cache to a local folder, so that whole shards are fetched"
                )
            if stop is not None and len(data) < stop - start:
                raise OSError(f"{len(data)} bytes came instead of {stop - start}")
            return data

        return self._retrying(name, self.describe(name), fetch)

    def _fetch(self, name: str, start: int, stop: int | None) -> bytes:
        span = {} if stop is None else {"start": start, "end": stop}
        path = f"{self.root}/{name}"
        if self.files.async_impl:
            return sync(self.files.loop, self.files._cat_file, path, timeout=self.timeout, **span)
        return self.files.cat_file(path, **span)

    def download(self, name: str, target: Path, check: Callable[[Path], None]) -> None:
        """Copy a whole file to `target`; `check` raises `OSError` if what came is not right."""

        def fetch() -> None:
            self.files.get_file(f"{self.root}/{name}", str(target))
            check(target)

        self._retrying(name, self.describe(name), fetch)

    def describe(self, name: str) -> str:
        return f"{self.url}/{name}"

    def renew(self, name: str) -> None:
        """Nothing is held: every read asks the server."""

    def close(self) -> None:
        """Close the connections, for a process forked from this one would disturb them as it drops them.

        fsspec closes them when a file system is collected, and every file system refers to itself.
        """
        self.files = None
        gc.collect()


def options(url: str, timeout: float) -> dict[str, Any]:
    """What fsspec is told of a URL: how long to wait, and to try once, for trying again is for `Retrying`."""
    told: dict[str, Any] = {"skip_instance_cache": True}  # closed when the storage is
    if url.startswith(("http://", "https://")):
        stalled = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        told["client_kwargs"] = {"timeout": stalled}
    elif url.startswith(("s3://", "s3a://")):
        given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        once = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
        told["config_kwargs"] = once | given
    return told


Storage = LocalStorage | RemoteStorage | PipeStorage


def open_storage(location: str, *, retries: int, timeout: float, pipe: bool = False) -> Storage:
    """The storage at a path, at a URL of any scheme that fsspec knows, or, if `pipe`, behind `pipe:COMMAND`."""
    if str(location).startswith(PIPE):
        if not pipe:
            raise UserError(f"{PIPE}… runs a shell command; set data.pipe=true and data.cache if that is meant")
        return PipeStorage(location, retries=retries, timeout=timeout)
    if "://" not in str(location):
        return LocalStorage(location)
    storage = RemoteStorage(location, retries=retries, timeout=timeout)
    return LocalStorage(storage.root) if isinstance(storage.files, LocalFileSystem) else storage
