"""One tar written by webdataset: the same photos always give the same bytes."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import webdataset as wds

from hpcm_scale.data.index import BLOCK, Shard


def padding(length: int) -> int:
    """Zero bytes after a file of `length` bytes."""
    return -length % BLOCK


class ShardWriter:
    """Writes one shard, and knows where each photo lies in it. A context manager."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.size = 0
        """Bytes of the photos, with headers and padding."""
        self._file = HashingFile(path)
        self._tar = wds.TarWriter(self._file, user="", group="", mode=0o644, mtime=0, compress=False, encoder=False)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_exception) -> None:
        self._tar.close()
        self._file.handle.close()

    def add(self, key: str, extension: str, data: bytes) -> int:
        """Append one photo; returns the offset of its first byte."""
        self._tar.write({"__key__": key, extension: data})
        offset = self.size + BLOCK
        self.size = offset + len(data) + padding(len(data))
        return offset

    def shard(self) -> Shard:
        """What the index says of the shard, once it is closed."""
        return Shard(self.name, self._file.bytes, self._file.digest.hexdigest())


class HashingFile:
    """A file to write to that counts and hashes what passes."""

    def __init__(self, path: Path) -> None:
        self.handle = path.open("wb")
        self.digest = sha256()
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self.handle.write(data)
