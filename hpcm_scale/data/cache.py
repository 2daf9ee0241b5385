"""A local cache of whole shards, shared by every process that reads the same URL."""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from pathlib import Path

from hpcm_scale.data.index import Shard
from hpcm_scale.data.storage import LocalStorage, RemoteStorage, sha256_of
from hpcm_scale.files import whole_file


class CachedStorage:
    """Shards behind a URL, each fetched whole when first read, checked, and kept in a folder.

    Files are named by their sha256, so that several sets may share a folder. Nothing is ever removed.
    """

    def __init__(self, remote: RemoteStorage, folder: str | Path, shards: Sequence[Shard]) -> None:
        self.remote = remote
        self.local = LocalStorage(folder)
        self.shards = {shard.name: shard for shard in shards}
        self.local.folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes start … stop − 1 of a shard. Raises `UserError` if it cannot be fetched."""
        cached = self._name(name)
        if not (self.local.folder / cached).exists():
            self._fetch(self.shards[name])
        return self.local.read(cached, start, stop)

    def describe(self, name: str) -> str:
        return self.local.describe(self._name(name))

    def close(self) -> None:
        self.local.close()

    def _name(self, name: str) -> str:
        return f"{self.shards[name].sha256}.tar"

    def _fetch(self, shard: Shard) -> None:
        cached = self.local.folder / self._name(shard.name)

        def check(path: Path) -> None:
            if sha256_of(path) != shard.sha256:
                raise OSError("what came is not the shard that the index describes")

        with (self.local.folder / ".lock").open("w") as lock:
            # One byte of the lock file stands for one shard, so different shards come side by side.
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(shard.sha256[:7], 16))
            if cached.exists():  # fetched by another process while this one waited
                return
            for left_behind in cached.parent.glob(f".{cached.name}.*.part"):
                left_behind.unlink()
            with whole_file(cached) as unfinished:
                self.remote.download(shard.name, unfinished, check)
