"""Builds webdataset shards with an index from image files; an interrupted build continues when run again.

Finished shards and records of their images are written to the folder `unfinished` of the set. At the end all files are
moved to the set's folder, the index last, so a set with an index is finished.
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
from os import fsencode
from pathlib import Path
from zlib import crc32

from webdataset.writer import TarWriter

from hpcm_scale.data.images import EXTENSIONS, decode, extension_of
from hpcm_scale.data.index import BLOCK, COLUMNS, INDEX, UNFINISHED, VERSION, Shard, ShardIndex, load_index
from hpcm_scale.data.processes import parallel
from hpcm_scale.data.sources import Source, find_sources
from hpcm_scale.errors import ESCAPE, UserError
from hpcm_scale.files import atomic_file, check_length, read_file, sha256_of, sync_folder, write_text

REPORT, PLAN, LOCK = "report.csv", "plan.json", "lock"


@dataclass(frozen=True)
class Image:
    """An image file that goes into the shards, byte for byte."""

    data: bytes
    extension: str
    width: int
    height: int


@dataclass(frozen=True)
class BuiltSet:
    """A finished set of shards."""

    index: ShardIndex
    report: Path
    """CSV of the skipped files, with reasons."""
    found_finished: bool
    """Whether the set had been finished before."""


def build_shards(
    images: Sequence[str | Path],
    out: str | Path,
    *,
    min_side: int,
    shard_size: int,
    workers: int,
    progress: Callable,
) -> BuiltSet:
    """Store the image files in the folders and files `images` as shards in the folder `out`, byte for byte.

    A file is skipped and reported if it cannot be decoded as JPEG, PNG or WebP, or if its smaller side is below
    `min_side` pixels. A shard is closed once it has `shard_size` bytes. The bytes of the set depend on the images and
    these two numbers only.

    `progress` returns a bar with `update(n)`, such as `tracking.progress`. Raises `UserError` for missing paths, for a
    set without an image, and if `out` holds a different set.
    """
    out = Path(out)
    check_length(out)
    sources = find_sources(images, without=out)
    fingerprint = fingerprint_of(sources, min_side, shard_size)
    if (out / INDEX).exists():
        index = load_index(str(out))
        if index.built["fingerprint"] != fingerprint:
            raise UserError(
                "other-shards",
                "--out",
                f"{out} holds a finished set of other images or options; choose another --out or remove it",
            )
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        return BuiltSet(index, out / REPORT, found_finished=True)
    try:
        with sole_builder(out):
            records = finished_records(out, fingerprint)
            done = sum(record["files"] for record in records)
            examined = parallel((partial(examine, source, min_side) for source in sources[done:]), workers)
            bar = progress(total=len(sources), initial=done, description="building", unit="file")
            with bar, closing(examined):
                rest = zip(sources[done:], examined, strict=True)
                while done < len(sources):
                    records.append(write_shard(out / UNFINISHED, len(records), rest, shard_size, bar))
                    done += records[-1]["files"]
            built = {"fingerprint": fingerprint, "min_side": min_side, "shard_size": shard_size}
            return BuiltSet(finish(out, records, built), out / REPORT, found_finished=False)
    except OSError as error:
        raise UserError(
            "unwritable-shards",
            "--out",
            f"cannot write to {out} ({error}); correct the cause and run the command again",
        ) from error


def fingerprint_of(sources: list[Source], min_side: int, shard_size: int) -> str:
    """Hash of everything that determines the bytes of a set, without opening the images."""
    digest = sha256(f"{VERSION} {min_side} {shard_size}\n".encode())
    for source in sources:
        digest.update(fsencode(source.name) + f"\0{source.size}\n".encode())
    return digest.hexdigest()


@contextmanager
def sole_builder(out: Path) -> Iterator[None]:
    """Lock an unfinished set."""
    (out / UNFINISHED).mkdir(parents=True, exist_ok=True)
    with (out / UNFINISHED / LOCK).open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "build-in-progress", "--out", f"another process is building {out}; wait, or choose another --out"
            ) from None
        yield


def finished_records(out: Path, fingerprint: str) -> list[dict]:
    """The records of shards that an interrupted build of the same set finished."""
    unfinished = out / UNFINISHED
    plan = unfinished / PLAN
    if not plan.exists() or json.loads(plan.read_text()) != {"fingerprint": fingerprint}:
        if any(out.glob("shard-*.tar")):
            raise UserError(
                "shards-without-index",
                "--out",
                f"{out} holds shards without an index; choose another --out or remove them",
            )
        for left_behind in unfinished.iterdir():
            if left_behind.name != LOCK:
                left_behind.unlink()
        write_text(plan, json.dumps({"fingerprint": fingerprint}))
    records = []
    while (path := unfinished / record_name(len(records))).exists():
        records.append(json.loads(path.read_text()))
    return records


def examine(source: Source, min_side: int) -> Image | str:
    """Decode one file; returns the image or the reason why it is skipped."""
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
    extension = suffix if suffix in EXTENSIONS else extension_of(data)
    assert extension is not None  # it has been decoded
    return Image(data, extension, width, height)


def write_shard(
    folder: Path, number: int, examined: Iterable[tuple[Source, Image | str]], shard_size: int, bar
) -> dict:
    """Write the next shard and its record, which it returns. The last record of a set may have no shard."""
    name = f"shard-{number:06d}.tar"
    samples = {column: [] for column in ("key", "extension", *COLUMNS)}
    skipped, files = [], 0
    # The same images give the same bytes.
    entry = {"user": "", "group": "", "mode": 0o644, "mtime": 0}
    with (
        atomic_file(folder / name) as unfinished,
        unfinished.open("wb") as file,
        TarWriter(file, **entry, compress=False, encoder=False) as tar,  # pyright: ignore[reportArgumentType]
    ):
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
                "offset": tar.tarstream.offset + BLOCK,
                "length": len(found.data),
                "width": found.width,
                "height": found.height,
                "crc32": crc32(found.data),
            }
            for column in samples:
                samples[column].append(row[column])
            tar.write({"__key__": source.key, found.extension: found.data})
            if tar.tarstream.offset >= shard_size:
                break
    path, shard = folder / name, None
    if samples["key"]:
        shard = asdict(Shard(name, path.stat().st_size, sha256_of(path)))
    else:
        path.unlink()
    record = {"files": files, "shard": shard, "samples": samples, "skipped": skipped}
    write_text(folder / record_name(number), json.dumps(record))
    return record


def record_name(number: int) -> str:
    """Name of the record of a finished shard in an unfinished set."""
    return f"record-{number:06d}.json"


def move_up(path: Path, out: Path) -> None:
    """Move a file to the folder of the set, unless an interrupted call has moved it."""
    if path.exists():
        path.replace(out / path.name)
        sync_folder(out)
    elif not (out / path.name).exists():
        raise UserError("shard-vanished", "--out", f"{path} has been removed; remove {out} and build it again")


def finish(out: Path, records: list[dict], built: dict) -> ShardIndex:
    """Write report and index, and move everything to its place, the index last. Raises UserError without any image."""
    unfinished = out / UNFINISHED
    skipped = [row for record in records for row in record["skipped"]]
    with (
        atomic_file(unfinished / REPORT) as report,
        report.open("w", newline="", encoding="utf-8", errors=ESCAPE) as handle,
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
        raise UserError(
            "no-usable-images",
            "--min-side",
            f"none of the {len(skipped)} files is a usable image; {out / REPORT} lists the reasons; correct "
            "them, or lower --min-side",
        )
    return index
