"""The index of a set of shards: the place of every image, for reading in any order."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hpcm_scale.data.storage import Unreadable, open_storage
from hpcm_scale.errors import UserError

INDEX = "index.json"
FORMAT = "hpcm_scale shards"
VERSION = 1
UNFINISHED = "unfinished"
"""Folder inside the set where it is built."""
COLUMNS = ("shard", "offset", "length", "width", "height", "crc32")
"""Integer columns of the samples; `key` and `extension` are strings."""
BLOCK = 512
"""Bytes of a tar block: each file has a header of one block, then its bytes, padded with zeros to whole blocks."""


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    bytes: int
    sha256: str


class ShardIndex:
    """The shards of a set, and the place and size of each sample in order.

    Integer columns are int64 arrays (N,): `shard`, `offset` and `length` (bytes of the image file inside
    the tar), `width` and `height` (pixels, upright), `crc32` (of the image file). `keys` and `extensions`
    are lists of N strings. `built` holds the options and the fingerprint of the build.
    """

    def __init__(self, shards: Sequence[Shard], samples: Mapping[str, Sequence], built: dict) -> None:
        """Raises `ValueError` if the columns are inconsistent, or hold what `hpcm shards build` never writes."""
        self.shards = list(shards)
        self.built = built
        self.keys: list[str] = list(samples["key"])
        self.extensions: list[str] = list(samples["extension"])
        self.shard, self.offset, self.length, self.width, self.height, self.crc32 = (
            np.asarray(samples[column], dtype=np.int64) for column in COLUMNS
        )
        columns = (self.extensions, *(getattr(self, column) for column in COLUMNS))
        if any(len(column) != len(self) for column in columns):
            raise ValueError("its columns differ in length")
        if len(self) and not 0 <= self.shard.min() <= self.shard.max() < len(self.shards):
            raise ValueError("it names shards that it does not list")
        self._check_names()
        self._check_places()

    def _check_names(self) -> None:
        """Names become paths: none may leave the folder of the set or of a cache."""
        names = [shard.name for shard in self.shards]
        if len(set(names)) < len(names):
            raise ValueError("it lists a shard twice")
        for name in (*names, *self.keys, *set(self.extensions)):
            if not isinstance(name, str) or not is_plain(name):
                raise ValueError(f"{name!r} is not a plain relative name")
        if any("/" in name for name in (*names, *set(self.extensions))):
            raise ValueError("its shards are in other folders")
        for shard in self.shards:
            if not isinstance(shard.bytes, int) or not re.fullmatch("[0-9a-f]{64}", str(shard.sha256)):
                raise ValueError(f"{shard.name} has no valid bytes and sha256")

    def _check_places(self) -> None:
        """Every image lies inside its shard, after a tar header of its own, and overlaps no other image."""
        if not len(self):
            return
        sizes = np.array([shard.bytes for shard in self.shards], dtype=np.int64)[self.shard]
        inside = (self.offset >= BLOCK) & (self.offset <= sizes) & (self.length > 0)
        inside &= self.length <= sizes - self.offset
        order = np.lexsort((self.offset, self.shard))
        shard, offset, length = self.shard[order], self.offset[order], self.length[order]
        apart = (shard[1:] != shard[:-1]) | (offset[1:] - BLOCK >= offset[:-1] + length[:-1])
        if not (inside.all() and apart.all()):
            raise ValueError("it has images that overlap or exceed their shards")
        if min(self.width.min(), self.height.min()) < 1:
            raise ValueError("it has images without pixels")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def smaller_sides(self) -> np.ndarray:
        """The smaller side of each image, pixels, int64 (N,)."""
        return np.minimum(self.width, self.height)

    @property
    def pixels(self) -> int:
        """Total pixels of all images."""
        return int((self.width * self.height).sum())

    @property
    def bytes(self) -> int:
        """Total bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the samples in order, hexadecimal: two sets with one digest give the same images."""
        content = json.dumps([self.keys, self.length.tolist(), self.crc32.tolist()])
        return hashlib.sha256(content.encode()).hexdigest()

    def to_json(self) -> str:
        """The content of index.json."""
        samples = {"key": self.keys, "extension": self.extensions}
        samples |= {column: getattr(self, column).tolist() for column in COLUMNS}
        content = {
            "format": FORMAT,
            "version": VERSION,
            "built": self.built,
            "shards": [asdict(shard) for shard in self.shards],
            "samples": samples,
        }
        return json.dumps(content, separators=(",", ":"))


def is_plain(name: str) -> bool:
    """Whether a name is relative, without `..` and printable: it stays inside the folder that it is joined to."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(parts)


def load_index(location: str, *, retries: int = 5, timeout: float = 30.0, pipe: bool = False) -> ShardIndex:
    """Read the index of the shards in a folder, at a URL of any fsspec scheme or, if `pipe`, behind `pipe:COMMAND`.

    `retries` and `timeout` (seconds) as in `open_storage`. Raises `UserError` if it is missing, cannot be read, is
    inconsistent, or has another format version.
    """
    storage = open_storage(location, retries=retries, timeout=timeout, pipe=pipe)
    try:
        text = storage.read(INDEX)
    except (FileNotFoundError, NotADirectoryError):
        command = f"`hpcm shards build IMAGES --out {location}`"
        if Path(location, UNFINISHED).is_dir():
            raise UserError(
                "unfinished-shards", "data.shards", f"the shards at {location} are unfinished; finish with {command}"
            ) from None
        raise UserError(
            "no-shards-there", "data.shards", f"there are no shards at {location}; build them with {command}"
        ) from None
    except Unreadable as error:
        raise UserError(
            "unreachable-shards",
            "data.shards",
            f"cannot read {storage.describe(INDEX)} {error}; check the server and the network, or raise data.retries "
            "or data.timeout",
        ) from None
    except OSError as error:
        raise UserError(
            "unreadable-index",
            "data.shards",
            f"cannot read {storage.describe(INDEX)} ({error.strerror}); check its permissions and the disk",
        ) from None
    finally:
        storage.close()
    try:
        content = json.loads(text)
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError(f"it does not have format version {VERSION}")
        shards = [Shard(**shard) for shard in content["shards"]]
        return ShardIndex(shards, content["samples"], content["built"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(
            "damaged-index",
            "data.shards",
            f"the index of the shards at {location} cannot be used ({error}); build the shards again",
        ) from None
