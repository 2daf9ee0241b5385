"""Finding image files, and giving each a key that is unique and fit for a tar."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcm_scale.errors import UserError

LONGEST_KEY = 80
"""Characters; with a suffix for uniqueness it stays within the 100 of one tar header."""


@dataclass(frozen=True)
class Source:
    """One file that was named or found."""

    path: Path
    name: str
    """Path below the folder that was named, with forward slashes."""
    key: str
    size: int
    """Bytes."""


def files_below(folder: Path, without: Path | None = None) -> Iterator[Path]:
    """Every file below `folder`, links followed once, the folder `without` left out."""
    seen = set() if without is None else {without.resolve()}
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        resolved = Path(parent).resolve()
        if resolved in seen:
            folders.clear()
            continue
        seen.add(resolved)
        folders.sort()
        for name in names:
            yield Path(parent) / name


def refuse(error: OSError) -> None:
    """A folder that cannot be read ends the search."""
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}; mend its permissions")


def find_sources(photos: Sequence[str | Path], without: Path) -> list[Source]:
    """All files in the folders and files `photos`, in order of name, each once.

    Names and keys depend on the paths below each folder only, not on where the folder lies. Raises
    `UserError` for a path that does not exist, and if there is no file at all.
    """
    found: dict[Path, tuple[str, Path]] = {}
    for given in map(Path, photos):
        if given.is_dir():
            for path in files_below(given, without):
                found.setdefault(path.resolve(), (path.relative_to(given).as_posix(), path))
        elif given.is_file():
            found.setdefault(given.resolve(), (given.name, given))
        else:
            raise UserError(f"there is no folder or file {given}; check the path to the photos")
    if not found:
        raise UserError(f"there is no file in {', '.join(map(str, photos))}; name a folder of photos")
    taken: dict[str, int] = {}
    ordered = sorted(found.values(), key=lambda item: item[0])
    return [Source(path, name, unique_key(name, taken), size_of(path)) for name, path in ordered]


def unique_key(name: str, taken: dict[str, int]) -> str:
    """A key from a file's name: ASCII, without dots (webdataset cuts keys at them), not yet in `taken`.

    `trips/Über uns.JPG` becomes `trips/ber_uns`; a second file of the same key gets `-2`, and so on.
    """
    parts = re.sub(r"\.[^./]*$", "", name).split("/")
    parts = [re.sub(r"[^A-Za-z0-9-]+", "_", part).strip("_") or "photo" for part in parts]
    plain = "/".join(parts)[-LONGEST_KEY:].lstrip("/_")
    key = plain
    while key in taken:
        taken[plain] += 1
        key = f"{plain}-{taken[plain]}"
    taken[key] = 1
    return key


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if it cannot be told."""
    try:
        return path.stat().st_size
    except OSError:  # a link to nothing: reported when it is read
        return 0
