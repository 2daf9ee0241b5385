"""A local cache of whole shards, shared by every process that reads the same source."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpcm_scale.data.index import Shard
from hpcm_scale.data.storage import LocalStorage, PipeStorage, RemoteStorage, Unreadable
from hpcm_scale.files import sha256_of, unfinished_name, whole_file, writing


class CachedStorage:
    """Shards that are far away, each fetched whole when first read, checked, and kept in a folder.

    Files are named by their sha256, so that several sets may share a folder. Only damaged ones are ever removed. Where
    no more can be kept, as on a full disk, what is not there yet is read from its source.
    """

    def __init__(self, remote: RemoteStorage | PipeStorage, folder: str | Path, shards: Sequence[Shard]) -> None:
        self.remote = remote
        self.local = LocalStorage(folder)
        self.shards = {shard.name: shard for shard in shards}
        self._keeps = True
        with writing(folder):
            self.local.folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start … stop − 1 of a shard. Raises what reading from its source may raise."""
        if self._path(name).exists() or self._keep(self.shards[name]):
            return self.local.read(self._path(name).name, start, stop)
        return self.remote.read(name, start, stop)

    def describe(self, name: str) -> str:
        return self.remote.describe(name)

    def renew(self, name: str) -> None:
        """Remove a shard that is damaged here; the next read fetches it again."""
        path = self._path(name)
        self.local.renew(path.name)
        with self._sole_owner(self.shards[name]):
            if path.exists() and sha256_of(path) != self.shards[name].sha256:
                path.unlink()

    def close(self) -> None:
        self.local.close()
        self.remote.close()

    def _path(self, name: str) -> Path:
        return self.local.folder / f"{self.shards[name].sha256}.tar"

    def _keep(self, shard: Shard) -> bool:
        """Fetch a shard, unless nothing can be written any more; whether it is here now."""
        try:
            if self._keeps:
                self._fetch(shard)
        except (FileNotFoundError, Unreadable):
            raise
        except OSError as error:
            self._keeps = False
            sys.stderr.write(
                f"hpcm: cannot write to data.cache={self.local.folder} ({error.strerror or error}); "
                "what is not there yet is read from its source\n"
            )
        return self._keeps

    def _fetch(self, shard: Shard) -> None:
        cached = self._path(shard.name)

        def check(path: Path) -> None:
            if sha256_of(path) != shard.sha256:
                raise OSError("what came is not the shard that the index describes")

        with self._sole_owner(shard):
            if cached.exists():  # fetched by another process while this one waited
                return
            for left_behind in cached.parent.glob(f"{unfinished_name(cached)}*.part"):
                left_behind.unlink()
            with whole_file(cached) as unfinished:
                self.remote.download(shard.name, unfinished, check)

    @contextmanager
    def _sole_owner(self, shard: Shard) -> Iterator[None]:
        """Hold what stands for a shard: one byte of the lock file, so that different shards come side by side."""
        self.local.folder.mkdir(parents=True, exist_ok=True)
        with (self.local.folder / ".lock").open("w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(shard.sha256[:7], 16))
            yield
