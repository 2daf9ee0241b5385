"""From folders of photos to webdataset shards with an index; interrupted, it goes on when called again.

Everything is written to a folder `unfinished` inside the set: each shard, when it is whole, and beside it
a record of its photos. When all is there it moves up, the index last: an index means a finished set.
"""

from __future__ import annotations

import csv
import fcntl
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from itertools import count
from os import fsencode
from pathlib import Path
from zlib import crc32

import webdataset as wds

from hpcm_scale.data.images import EXTENSIONS, decode, extension_of
from hpcm_scale.data.index import BLOCK, COLUMNS, INDEX, UNFINISHED, VERSION, Shard, ShardIndex, load_index
from hpcm_scale.data.processes import parallel_map
from hpcm_scale.data.sources import Source, find_sources
from hpcm_scale.errors import SHOWN, UserError
from hpcm_scale.files import check_length, read_file, sync_folder, whole_file, write_text

# One tar written by webdataset: the same photos always give the same bytes.


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


REPORT, PLAN, LOCK = "report.csv", "plan.json", "lock"


@dataclass(frozen=True)
class Photo:
    """A file that may be trained on."""

    data: bytes
    extension: str
    width: int
    height: int


@dataclass(frozen=True)
class BuiltSet:
    """A finished set of shards."""

    index: ShardIndex
    report: Path
    """The files that were skipped, with reasons."""
    found_finished: bool
    """Whether there was nothing left to do."""


def build_shards(
    photos: Sequence[str | Path],
    out: str | Path,
    *,
    min_side: int,
    shard_size: int,
    workers: int,
    progress: Callable,
) -> BuiltSet:
    """Store the photos found in folders and files `photos` as shards in the folder `out`.

    A file is skipped, and reported with the reason, if it does not decode as JPEG, PNG or WebP or if its
    smaller side is under `min_side` pixels. A shard is closed by the photo that brings it to `shard_size`
    bytes. The bytes of the set depend on the photos and these two numbers only.

    `progress` returns a bar with `update(n)`, such as `tracking.progress`. Raises
    `UserError` for missing paths, for a set without a photo, and if `out` holds a different set.
    """
    out = Path(out)
    check_length(out)
    sources = find_sources(photos, without=out)
    fingerprint = fingerprint_of(sources, min_side, shard_size)
    if (out / INDEX).exists():
        index = load_index(str(out))
        if index.built["fingerprint"] != fingerprint:
            raise UserError(f"{out} holds a finished set of other photos or options; choose another --out or remove it")
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        return BuiltSet(index, out / REPORT, found_finished=True)
    try:
        with sole_builder(out):
            records = finished_records(out, fingerprint)
            done = sum(record["files"] for record in records)
            examined = parallel_map(partial(examine, min_side=min_side), sources[done:], workers)
            bar = progress(total=len(sources), initial=done, description="building", unit="file")
            with bar, closing(examined):
                rest = zip(sources[done:], examined, strict=True)
                while done < len(sources):
                    records.append(write_shard(out / UNFINISHED, len(records), rest, shard_size, bar))
                    done += records[-1]["files"]
            built = {"fingerprint": fingerprint, "min_side": min_side, "shard_size": shard_size}
            return BuiltSet(finish(out, records, built), out / REPORT, found_finished=False)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error}); mend that and call again to go on") from error


def fingerprint_of(sources: list[Source], min_side: int, shard_size: int) -> str:
    """What decides about the bytes of a set, short of opening the photos."""
    digest = sha256(f"{VERSION} {min_side} {shard_size}\n".encode())
    for source in sources:
        digest.update(fsencode(source.name) + f"\0{source.size}\n".encode())
    return digest.hexdigest()


@contextmanager
def sole_builder(out: Path) -> Iterator[None]:
    """Hold the lock of an unfinished set."""
    (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
    with (out / UNFINISHED / LOCK).open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is building {out}; wait, or choose another --out") from None
        yield


def finished_records(out: Path, fingerprint: str) -> list[dict]:
    """The records of shards that an interrupted build of the same set left whole."""
    unfinished = out / UNFINISHED
    plan = unfinished / PLAN
    if not plan.exists() or json.loads(plan.read_text()) != {"fingerprint": fingerprint}:
        if any(out.glob("shard-*.tar")):
            raise UserError(f"{out} holds shards without an index; choose another --out or remove them")
        for left_behind in unfinished.iterdir():
            if left_behind.name != LOCK:
                left_behind.unlink()
        write_text(plan, json.dumps({"fingerprint": fingerprint}))
    records = []
    for number in count():
        path = unfinished / record_name(number)
        if not path.exists():
            return records
        records.append(json.loads(path.read_text()))


def examine(source: Source, min_side: int) -> Photo | str:
    """Decode one file; returns the photo or the reason why it is skipped."""
    try:
        data = read_file(source.path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not data:
        return "empty file"
    try:
        width, height = decode(data).size
    except ValueError as error:
        return str(error)
    if min(width, height) < min_side:
        return f"too small: {width}×{height}, smaller side under {min_side}"
    suffix = source.path.suffix.lower().lstrip(".")
    return Photo(data, suffix if suffix in EXTENSIONS else extension_of(data), width, height)


def write_shard(
    folder: Path, number: int, examined: Iterable[tuple[Source, Photo | str]], shard_size: int, bar
) -> dict:
    """Write the next shard and its record. The last record of a set may be without a shard."""
    name = f"shard-{number:06d}.tar"
    samples = {column: [] for column in ("key", "extension", *COLUMNS)}
    skipped, files = [], 0
    with whole_file(folder / name) as unfinished, ShardWriter(unfinished, name) as writer:
        for source, found in examined:
            files += 1
            bar.update(1)
            if isinstance(found, str):
                skipped.append((str(source.path), found))
                continue
            row = {
                "key": source.key,
                "extension": found.extension,
                "shard": number,
                "offset": writer.add(source.key, found.extension, found.data),
                "length": len(found.data),
                "width": found.width,
                "height": found.height,
                "crc32": crc32(found.data),
            }
            for column in samples:
                samples[column].append(row[column])
            if writer.size >= shard_size:
                break
    if not samples["key"]:
        (folder / name).unlink()
    shard = asdict(writer.shard()) if samples["key"] else None
    record = {"files": files, "shard": shard, "samples": samples, "skipped": skipped}
    write_text(folder / record_name(number), json.dumps(record))
    return record


def record_name(number: int) -> str:
    """The file that tells what a finished shard holds, while others are still being written."""
    return f"record-{number:06d}.json"


def move_up(path: Path, out: Path) -> None:
    """Move a file to the folder of the set, if it is there."""
    if path.exists():
        path.replace(out / path.name)
        sync_folder(out)
    elif not (out / path.name).exists():  # else an interrupted call has moved it
        raise UserError(f"{path} has vanished; remove {out} and build again")


def finish(out: Path, records: list[dict], built: dict) -> ShardIndex:
    """Write report and index, and move everything to its place, the index last."""
    unfinished = out / UNFINISHED
    skipped = [row for record in records for row in record["skipped"]]
    with (
        whole_file(unfinished / REPORT) as report,
        report.open("w", newline="", encoding="utf-8", errors=SHOWN) as handle,
    ):
        csv.writer(handle).writerows([("file", "reason"), *skipped])
    samples = {
        column: [value for record in records for value in record["samples"][column]] for column in records[0]["samples"]
    }
    shards = [Shard(**record["shard"]) for record in records if record["shard"]]
    index = ShardIndex(shards, samples, built | {"skipped": len(skipped)})
    write_text(unfinished / INDEX, index.to_json())
    for name in (*(shard.name for shard in shards), REPORT):
        move_up(unfinished / name, out)
    if shards:
        move_up(unfinished / INDEX, out)
    shutil.rmtree(unfinished)
    if not shards:
        raise UserError(f"none of the {len(skipped)} files is a photo to train on; {out / REPORT} says why")
    return index
