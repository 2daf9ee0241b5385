"""Reading byte ranges of shards: from a folder, from a URL, or from a URL by way of a local cache."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import BinaryIO, TypeVar

import aiohttp
import fsspec
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem

from hpcm_scale.errors import UserError

Result = TypeVar("Result")


class LocalStorage:
    """A folder on this machine."""

    OPEN_FILES = 128
    """Handles kept open, least recently used closed first: a large set has more shards than that."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._handles: dict[str, BinaryIO] = {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start … stop − 1 of a file, fewer if it ends before. Raises `FileNotFoundError`."""
        handle = self._handles.pop(name, None) or (self.folder / name).open("rb", buffering=0)
        self._handles[name] = handle
        if len(self._handles) > self.OPEN_FILES:
            self._handles.pop(next(iter(self._handles))).close()
        if stop is None:
            stop = os.fstat(handle.fileno()).st_size
        return os.pread(handle.fileno(), stop - start, start)

    def describe(self, name: str) -> str:
        return str(self.folder / name)

    def close(self) -> None:
        while self._handles:
            self._handles.popitem()[1].close()


class RemoteStorage:
    """A folder behind a URL: http(s) by range requests, other schemes by their fsspec packages.

    A read that fails is tried `retries` times in all, with exponential back-off and jitter, unless the
    server says that it will never succeed; then it is one `UserError`. `timeout` is in seconds per read.
    """

    def __init__(self, url: str, *, retries: int, timeout: float) -> None:
        self.url = url.rstrip("/")
        self.retries = retries
        self.timeout = timeout
        options = {"skip_instance_cache": True}  # closed when this storage is
        if self.url.startswith(("http://", "https://")):
            stalled = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            options["client_kwargs"] = {"timeout": stalled}
        try:
            self.files, self.root = fsspec.core.url_to_fs(self.url, **options)
        except (ValueError, ImportError) as error:
            raise UserError(f"cannot read {url}: {error}") from None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start … stop − 1 of a file. Raises `FileNotFoundError`, or `UserError` for other failures."""

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

        return self._persist(name, fetch)

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

        self._persist(name, fetch)

    def describe(self, name: str) -> str:
        return f"{self.url}/{name}"

    def close(self) -> None:
        """Close the connections, for a process forked from this one would disturb them as it drops them.

        fsspec closes them when a file system is collected, and every file system refers to itself.
        """
        self.files = None
        gc.collect()

    def _persist(self, name: str, action: Callable[[], Result]) -> Result:
        for attempt in count(1):
            try:
                return action()
            except (UserError, FileNotFoundError):
                raise
            except Exception as error:  # every scheme raises kinds of its own
                if attempt >= self.retries or is_permanent(error):
                    reason = " ".join(f"{type(error).__name__} {error}".split())
                    tries = "1 try" if attempt == 1 else f"{attempt} tries"
                    raise UserError(
                        f"cannot read {self.describe(name)} after {tries} ({reason}); check the server and "
                        "the network, or raise data.retries or data.timeout"
                    ) from error
            time.sleep(pause(attempt))


def is_permanent(error: Exception) -> bool:
    """Whether trying again is useless: an HTTP status 4xx other than time-out and too many requests."""
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)


def pause(attempt: int) -> float:
    """Seconds before the next try: 0.5, 1, 2 … 30, of which up to a half is taken off by chance."""
    return min(30.0, 0.5 * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)


def open_storage(location: str, *, retries: int, timeout: float) -> LocalStorage | RemoteStorage:
    """The storage at a path, or at a URL of any scheme that fsspec knows."""
    if "://" not in str(location):
        return LocalStorage(location)
    storage = RemoteStorage(location, retries=retries, timeout=timeout)
    return LocalStorage(storage.root) if isinstance(storage.files, LocalFileSystem) else storage


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
