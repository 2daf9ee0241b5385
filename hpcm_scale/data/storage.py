"""Reading byte ranges of shards: from a folder, from a URL, or from a shell command."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar
from weakref import WeakSet

import aiohttp
import fsspec
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem

from hpcm_scale.config.urls import PIPE, check_no_secret
from hpcm_scale.data.pipe import PipeStorage
from hpcm_scale.data.retrying import Retrying
from hpcm_scale.errors import UserError


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
