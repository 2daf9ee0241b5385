"""Verifies shards against their index (hashes, tar members, decoding), and describes them."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zlib import crc32

import numpy as np

from hpcm_scale.data.images import decode
from hpcm_scale.data.index import BLOCK, Shard, ShardIndex, is_plain
from hpcm_scale.data.processes import parallel
from hpcm_scale.files import sha256_of
from hpcm_scale.formatting import counted

IMAGES_PER_JOB = 32
HASH_DIFFERS = "its sha256 differs, although every image in it is intact"
"""Omitted if damage of an image explains it."""
KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.DIRTYPE: "a folder",
}


@dataclass(frozen=True)
class Damage:
    """A difference between the shards and their index."""

    shard: str
    what: str
    sample: str | None = None
    """Its key; None if the damage is not that of one sample."""

    def __str__(self) -> str:
        return f"{self.shard}: " + (f"sample {self.sample}: " if self.sample else "") + self.what


class Entry(NamedTuple):
    """The index entry of one sample."""

    key: str
    extension: str
    offset: int
    length: int
    width: int
    height: int
    crc32: int


def verify_shards(folder: str | Path, index: ShardIndex, *, workers: int, progress: Callable) -> list[Damage]:
    """Check every shard and every image of a set in a local folder; returns all damage found.

    `progress` is as in `build_shards`.
    """
    folder = Path(folder)
    listed = {shard.name for shard in index.shards}
    damages = [
        Damage(path.name, "not in the index") for path in sorted(folder.glob("shard-*.tar")) if path.name not in listed
    ]
    checks = parallel(jobs(folder, index), workers)
    with progress(total=len(index), description="verifying", unit="image") as bar, closing(checks):
        for images, found in checks:
            bar.update(images)
            damages += found
    named = {damage.shard for damage in damages if damage.sample}
    return [damage for damage in damages if damage.what != HASH_DIFFERS or damage.shard not in named]


def jobs(folder: Path, index: ShardIndex) -> Iterator[partial]:
    """Checks of shards and of groups of samples, each returning (images checked, damage found)."""
    columns = (index.offset, index.length, index.width, index.height, index.crc32)
    for number, shard in enumerate(index.shards):
        samples = (index.shard == number).nonzero()[0]
        yield partial(check_shard, folder, shard, frozenset(index.offset[samples].tolist()))
        for start in range(0, len(samples), IMAGES_PER_JOB):
            group = samples[start : start + IMAGES_PER_JOB]
            names = ([index.keys[sample] for sample in group], [index.extensions[sample] for sample in group])
            entries = [*map(Entry, *names, *(column[group].tolist() for column in columns))]
            yield partial(check_samples, folder, shard, entries)


def check_shard(folder: Path, shard: Shard, offsets: frozenset[int]) -> tuple[int, list[Damage]]:
    """Check one shard: presence, size, hash, and that its tar holds only the images at `offsets` (bytes)."""
    path = folder / shard.name
    if not path.is_file():
        return 0, [Damage(shard.name, "missing")]
    damages = [Damage(shard.name, what) for what in strangers(path, offsets)]
    size = path.stat().st_size
    if size != shard.bytes:
        damages.append(Damage(shard.name, f"{size} bytes instead of {shard.bytes}"))
    elif sha256_of(path) != shard.sha256:
        damages.append(Damage(shard.name, HASH_DIFFERS))
    return 0, damages


def strangers(path: Path, offsets: frozenset[int]) -> Iterator[str]:
    """Members of a tar other than regular files at `offsets`, up to any damage, which the hash reports."""
    damage = suppress(tarfile.TarError, ValueError, OSError, EOFError, MemoryError, OverflowError)
    with damage, tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                kind = KINDS.get(member.type, "of an unknown kind")
                yield f"its member {member.name!r} is {kind}, not a regular file"
            elif not is_plain(member.name):
                yield f"its member {member.name!r} would be unpacked outside of the target folder"
            elif member.offset_data not in offsets:
                yield f"its member {member.name!r} is not in the index"


def check_samples(folder: Path, shard: Shard, entries: list[Entry]) -> tuple[int, list[Damage]]:
    """Check tar header, bytes, decoding and size of some samples of one shard."""
    path = folder / shard.name
    if not path.is_file():
        return len(entries), []
    with path.open("rb") as handle:
        damages = [Damage(shard.name, what, entry.key) for entry in entries if (what := problem(handle, entry))]
    return len(entries), damages


def problem(handle: BinaryIO, entry: Entry) -> str | None:
    """The damage of one sample in an open shard, or None."""
    handle.seek(entry.offset - BLOCK)
    header, data = handle.read(BLOCK), handle.read(entry.length)
    zeros = handle.read(-entry.length % BLOCK)
    if len(data) < entry.length:
        return "cut off"
    if crc32(data) != entry.crc32:
        return "its bytes are damaged"
    try:
        member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"its tar header is damaged ({error})"
    if (member.name, member.size) != (f"{entry.key}.{entry.extension}", entry.length):
        return f"the tar holds {member.name} of {member.size} bytes there"
    if any(zeros):
        return "the padding after it is damaged"
    try:
        size = decode(data).size
    except ValueError as error:
        return str(error)
    if size != (entry.width, entry.height):
        return f"{size[0]}×{size[1]} pixels instead of {entry.width}×{entry.height}"
    return None


EDGES = (0, 256, 512, 768, 1024, 1536, 2048, 4096)
"""Lower edges of the histogram of smaller sides, pixels; 256 and 512 are usual crops."""


def describe(location: str, index: ShardIndex) -> str:
    """A summary for `hpcm shards info`: counts, megapixels, bytes, smallest side, histogram of smaller sides."""
    sides = index.smaller_sides
    smallest = int(sides.argmin())
    lines = [
        f"{location}: {counted(len(index), 'image')} in {counted(len(index.shards), 'shard')}",
        f"  {index.pixels / 1e6:,.1f} megapixels, {index.bytes / 1e6:,.1f} MB"
        f" ({8 * index.length.sum() / index.pixels:.2f} bits per pixel)",
        f"  smallest side {sides[smallest]} pixels ({index.keys[smallest]})",
        "",
        "  smaller side, pixels",
    ]
    counts = np.histogram(sides, bins=(*EDGES, np.inf))[0]
    for low, high, count in zip(EDGES, (*EDGES[1:], None), counts, strict=True):
        if count:
            span = f"{low:,} and more" if high is None else f"{low:,} to {high - 1:,}"
            lines.append(f"  {span:>16} {count:>9,} {'█' * max(1, round(40 * count / counts.max()))}")
    return "\n".join(lines)
