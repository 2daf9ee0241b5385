"""A local cache of whole shards, shared by all processes."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpcm_scale.data.index import Shard
from hpcm_scale.data.storage import LocalStorage, PipeStorage, RemoteStorage, Unreadable
from hpcm_scale.files import atomic_file, sha256_of, unfinished_name, writing


class CachedStorage:
    """Remote shards; each is downloaded whole when first read, verified by its SHA-256 and kept in a folder.

    Files are named by their SHA-256, so that several sets may share a folder. Only damaged files are removed. If the
    cache cannot be written, for example because the disk is full, shards that are not cached are read remotely.
    """

    def __init__(self, remote: RemoteStorage | PipeStorage, folder: str | Path, shards: Sequence[Shard]) -> None:
        self.remote = remote
        self.local = LocalStorage(folder)
        self.shards = {shard.name: shard for shard in shards}
        self._writable = True
        with writing(folder):
            self.local.folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start … stop − 1 of a shard. Raises as the `read` of the remote storage."""
        if self._path(name).exists() or self._ensure(self.shards[name]):
            return self.local.read(self._path(name).name, start, stop)
        return self.remote.read(name, start, stop)

    def describe(self, name: str) -> str:
        return self.remote.describe(name)

    def renew(self, name: str) -> None:
        """Remove the cached copy of a shard if it is damaged; the next read downloads it again."""
        path = self._path(name)
        self.local.renew(path.name)
        with self._locked(self.shards[name]):
            if path.exists() and sha256_of(path) != self.shards[name].sha256:
                path.unlink()

    def close(self) -> None:
        self.local.close()
        self.remote.close()

    def _path(self, name: str) -> Path:
        return self.local.folder / f"{self.shards[name].sha256}.tar"

    def _ensure(self, shard: Shard) -> bool:
        """Download a shard unless the cache cannot be written; returns whether it is cached."""
        try:
            if self._writable:
                self._download(shard)
        except (FileNotFoundError, Unreadable):
            raise
        except OSError as error:
            self._writable = False
            sys.stderr.write(
                f"hpcm: cannot write to data.cache={self.local.folder} ({error.strerror or error}); "
                "shards that are not cached are read remotely\n"
            )
        return self._writable

    def _download(self, shard: Shard) -> None:
        cached = self._path(shard.name)

        def check(path: Path) -> None:
            if sha256_of(path) != shard.sha256:
                raise OSError("the downloaded file is not the shard that the index describes")

        with self._locked(shard):
            if cached.exists():  # downloaded by another process while this one waited
                return
            for left_behind in cached.parent.glob(f"{unfinished_name(cached)}*.part"):
                left_behind.unlink()
            with atomic_file(cached) as unfinished:
                self.remote.download(shard.name, unfinished, check)

    @contextmanager
    def _locked(self, shard: Shard) -> Iterator[None]:
        """Lock a shard: one byte of one lock file, so that different shards are downloaded in parallel.

        `filelock` locks whole files: it would leave one lock file per shard.
        """
        self.local.folder.mkdir(parents=True, exist_ok=True)
        with (self.local.folder / ".lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(shard.sha256[:7], 16))
            yield
