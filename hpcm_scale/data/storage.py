"""Byte ranges of shards from a folder, a URL or a shell command."""

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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar
from weakref import WeakSet

import fsspec.config
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem

from hpcm_scale.errors import UserError
from hpcm_scale.files import PIPE, check_no_secret, without_secrets

Result = TypeVar("Result")

GIVEN_UP_SECONDS = 60.0
"""Time for which a file that could not be read is not tried again."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""EFBIG: a limit on file sizes."""
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"}
"""Exceptions of botocore, which is an optional dependency."""


class Unreadable(OSError):
    """A file could not be read after all retries; the text holds their number and the last error."""


class RetryingStorage(ABC):
    """Files that are read from another machine or process, with up to `retries` attempts of `timeout` seconds each.

    Two rules bound the time that an unreachable server costs: a file that failed is not tried again for a minute,
    and after a file has failed, the next ones get a single attempt until one succeeds. A retry library such as
    tenacity has neither rule, and would replace only the loop.
    """

    def __init__(self, *, retries: int, timeout: float) -> None:
        self.timeout = timeout
        self._tries = retries
        self._failing = False
        self._given_up: dict[str, tuple[float, str]] = {}
        """Until when (monotonic clock, seconds), and why."""

    @abstractmethod
    def describe(self, name: str) -> str:
        """The file in a message."""

    @abstractmethod
    def _copy(self, name: str, target: Path) -> None:
        """Copy a whole file to `target`, in one attempt."""

    def download(self, name: str, target: Path, check: Callable[[Path], None]) -> None:
        """Copy a whole file to `target`; `check` raises `OSError` if it is wrong."""

        def fetch() -> None:
            self._copy(name, target)
            check(target)

        self._retried(name, fetch)

    def renew(self, name: str) -> None:  # noqa: B027
        """No-op: no file stays open between reads."""

    def close(self) -> None:  # noqa: B027
        """Close connections, if there are any."""

    def _retried(self, name: str, action: Callable[[], Result]) -> Result:
        """The result of `action`, which reads the file `name`.

        Raises `FileNotFoundError` and a full disk's `OSError` at once, `UserError` for missing credentials, and
        `Unreadable` when the attempts are used up or the error is permanent.
        """
        until, reason = self._given_up.get(name, (0.0, ""))
        if time.monotonic() < until:
            raise Unreadable(reason)
        tries = 1 if self._failing else self._tries
        attempt = 0
        while True:
            attempt += 1
            try:
                result = action()
            except (UserError, FileNotFoundError):
                raise
            except Exception as error:  # every scheme raises its own
                if type(error).__name__ in NO_CREDENTIALS:
                    raise UserError(
                        "no-credentials",
                        "data.shards",
                        f"there are no credentials for {self.describe(name)}; set them in the environment "
                        "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; FSSPEC_S3_ANON=true for a "
                        "public bucket)",
                    ) from None
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    raise
                if attempt >= tries or is_permanent(error):
                    cause = without_secrets(" ".join(f"{type(error).__name__} {error}".split()))
                    reason = f"after {attempt} {'try' if attempt == 1 else 'tries'} ({cause})"
                    self._failing = True
                    self._given_up[name] = (time.monotonic() + GIVEN_UP_SECONDS, reason)
                    raise Unreadable(reason) from error
            else:
                self._failing = False
                return result
            time.sleep(pause(attempt))


def is_permanent(error: Exception) -> bool:
    """Whether a retry is useless: status 4xx of HTTP or S3, except time-outs and too many requests."""
    if isinstance(error, TimeoutError):  # S3's RequestTimeout has status 400
        return False
    answer = getattr(error.__cause__, "response", None)  # botocore's, as the cause of s3fs's error
    status = answer["ResponseMetadata"].get("HTTPStatusCode") if isinstance(answer, dict) else None
    status = getattr(error, "status", status)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)


def pause(attempt: int) -> float:
    """Seconds before the next attempt: 0.5, 1, 2 … 30, reduced at random by up to a half."""
    return min(30.0, 0.5 * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)


PLACEHOLDER = "{}"
"""Replaced by the name of a file in the command."""
STDERR_BYTES = 1000
"""End of the command's standard error that is kept."""


class PipeStorage(RetryingStorage):
    """Whole files from the standard output of a shell command in which `{}` is replaced by the file's name.

    An attempt has failed if the command fails or writes nothing for `timeout` seconds.
    """

    def __init__(self, location: str, *, retries: int, timeout: float) -> None:
        super().__init__(retries=retries, timeout=timeout)
        self.command = location.removeprefix(PIPE)
        if PLACEHOLDER not in self.command:
            raise UserError(
                "pipe-without-placeholder",
                "data.shards",
                f"the command of data.shards={PIPE}… has no {PLACEHOLDER}; write it in place of the file name",
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """A whole file. Raises `Unreadable`, and `UserError` for a byte range."""
        if start or stop is not None:
            raise UserError(
                "pipe-cache-full",
                "data.cache",
                f"data.shards={PIPE}… reads whole shards only, and data.cache cannot store them; free space there, or "
                "choose another folder",
            )

        def fetch() -> bytes:
            with BytesIO() as sink:
                self._run(name, sink)
                return sink.getvalue()

        return self._retried(name, fetch)

    def describe(self, name: str) -> str:
        return f"{name} from {PIPE}…"

    def _copy(self, name: str, target: Path) -> None:
        with target.open("wb") as sink:
            self._run(name, sink)

    def _run(self, name: str, sink: BinaryIO) -> None:
        with _shell(self.command.replace(PLACEHOLDER, shlex.quote(name))) as process:
            stderr = self._forward(process, sink)
            code = process.wait(self.timeout)
        if code:
            lines = stderr.decode(errors="replace").strip().splitlines()
            raise OSError(f"exit code {code}" + (f": {lines[-1]}" if lines else ""))

    def _forward(self, process: subprocess.Popen[bytes], sink: BinaryIO) -> bytes:
        """Copy standard output to `sink`; returns the end of standard error."""
        assert process.stdout is not None and process.stderr is not None
        stderr = b""
        with selectors.DefaultSelector() as selector:
            for pipe in (process.stdout, process.stderr):
                selector.register(pipe, selectors.EVENT_READ)
            deadline = time.monotonic() + self.timeout
            while process.stdout in {key.fileobj for key in selector.get_map().values()}:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"the command wrote nothing for {self.timeout:g} seconds")
                for key, _ in ready:
                    block = os.read(key.fd, 1 << 20)
                    if not block:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is process.stdout:
                        sink.write(block)
                        deadline = time.monotonic() + self.timeout
                    else:
                        stderr = (stderr + block)[-STDERR_BYTES:]
        return stderr


@contextmanager
def _shell(command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running shell; it and all its children are killed on exit."""
    with subprocess.Popen(
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


class LocalStorage:
    """A local folder."""

    OPEN_FILES = 128
    """Handles kept open, shared by all storages of a process; the least recently used is closed first."""
    _all: ClassVar[WeakSet[LocalStorage]] = WeakSet()

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._handles: dict[str, BinaryIO] = {}
        self._all.add(self)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start … stop − 1 of a file, fewer if it is shorter. Raises `OSError`."""
        handle = self._handles.pop(name, None) or (self.folder / name).open("rb", buffering=0)
        self._handles[name] = handle
        while len(self._handles) > max(1, self.OPEN_FILES // len(self._all)):
            self._handles.pop(next(iter(self._handles))).close()
        size = os.fstat(handle.fileno()).st_size  # a damaged index must not allocate more memory
        stop = size if stop is None else min(stop, size)
        return os.pread(handle.fileno(), max(0, stop - start), start)

    def describe(self, name: str) -> str:
        """The file in a message."""
        return str(self.folder / name)

    def renew(self, name: str) -> None:
        """Reopen the file at the next read: it may have been replaced."""
        if name in self._handles:
            self._handles.pop(name).close()

    def close(self) -> None:
        while self._handles:
            self._handles.popitem()[1].close()


class RemoteStorage(RetryingStorage):
    """A folder at a URL: http(s) by range requests, other schemes by their fsspec packages.

    Credentials and endpoints come from the environment.
    """

    files: Any
    """fsspec's file system; None after `close`."""

    def __init__(self, url: str, *, retries: int, timeout: float) -> None:
        super().__init__(retries=retries, timeout=timeout)
        check_no_secret(url, "the URL of the shards")
        self.url = url.rstrip("/")
        try:
            self.files, self.root = fsspec.core.url_to_fs(self.url, **options(self.url, timeout))
        except (ValueError, ImportError) as error:
            raise UserError(
                "unknown-url",
                "data.shards",
                f"cannot read {url} ({error}); correct the URL, or install the fsspec package of its scheme",
            ) from None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start … stop − 1 of a file.

        Raises `FileNotFoundError`, `Unreadable`, or `UserError` for mistakes that affect every file.
        """

        def fetch() -> bytes:
            data = self._fetch(name, start, stop)
            if stop is not None and len(data) > stop - start:
                raise UserError(
                    "no-range-requests",
                    "data.cache",
                    f"the server of {self.describe(name)} ignores range requests; set data.cache to a local folder, so "
                    "that whole shards are downloaded",
                )
            if stop is not None and len(data) < stop - start:
                raise OSError(f"{len(data)} bytes instead of {stop - start}")
            return data

        return self._retried(name, fetch)

    def _fetch(self, name: str, start: int, stop: int | None) -> bytes:
        span = {} if stop is None else {"start": start, "end": stop}
        path = f"{self.root}/{name}"
        if self.files.async_impl:
            return sync(self.files.loop, self.files._cat_file, path, timeout=self.timeout, **span)  # pyright: ignore[reportReturnType]
        return self.files.cat_file(path, **span)

    def _copy(self, name: str, target: Path) -> None:
        self.files.get_file(f"{self.root}/{name}", str(target))

    def describe(self, name: str) -> str:
        return f"{self.url}/{name}"

    def close(self) -> None:
        """Close the connections: a process forked later must not inherit them.

        fsspec closes them when a file system is garbage-collected, and file systems are reference cycles.
        """
        self.files = None
        gc.collect()


def options(url: str, timeout: float) -> dict[str, Any]:
    """Options of fsspec for a URL: time-outs, and a single attempt, because `Retrying` repeats it."""
    chosen: dict[str, Any] = {"skip_instance_cache": True}  # closed when the storage is
    if url.startswith(("http://", "https://")):
        import aiohttp  # slow, and local shards do without

        stalled = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        chosen["client_kwargs"] = {"timeout": stalled}
    elif url.startswith(("s3://", "s3a://")):
        given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        once = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
        chosen["config_kwargs"] = once | given
    return chosen


Storage = LocalStorage | RemoteStorage | PipeStorage


def open_storage(location: str, *, retries: int, timeout: float, pipe: bool = False) -> Storage:
    """The storage at a path, at a URL of any fsspec scheme, or, if `pipe`, behind `pipe:COMMAND`.

    `retries`: attempts per read; `timeout`: seconds per attempt. Raises UserError for a wrong location.
    """
    if str(location).startswith(PIPE):
        if not pipe:
            raise UserError(
                "pipe-not-enabled",
                "data.pipe",
                f"{PIPE}… runs a shell command; set data.pipe=true and data.cache if that is intended",
            )
        return PipeStorage(location, retries=retries, timeout=timeout)
    if "://" not in str(location):
        return LocalStorage(location)
    storage = RemoteStorage(location, retries=retries, timeout=timeout)
    return LocalStorage(storage.root) if isinstance(storage.files, LocalFileSystem) else storage
