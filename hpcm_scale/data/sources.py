"""Finding image files, and giving each a key that is unique and fit for a tar."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from hpcm_scale.data.images import BACKGROUND, EXTENSIONS, Colour, TransparentImage, decode, to_array
from hpcm_scale.errors import UserError, is_first_process, say, shown
from hpcm_scale.files import kind_of, read_file

IMAGE = "JPEG, PNG or WebP image"
MEND = "name a folder that holds some"
MOST_NAMED = 5
"""Files that one line names."""

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
    """Everything below `folder` that is no folder, links followed once, the folder `without` left out.

    Folders that cannot be read are among it; if `folder` itself is one, UserError.
    """
    seen = set() if without is None else {os.path.realpath(without)}
    unreadable: list[Path] = []

    def refuse(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise UserError(f"cannot read the folder {folder}: {error.strerror}; mend its permissions")
        unreadable.append(Path(error.filename))

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        resolved = os.path.realpath(parent)
        if resolved in seen:
            folders.clear()
            continue
        seen.add(resolved)
        folders.sort()
        for name in names:
            yield Path(parent) / name
    yield from unreadable


def choose_files(folder: Path, wanted: Callable[[Path], bool], kind: str, mend: str = MEND) -> list[Path]:
    """The files below `folder` that are `wanted`, in order of name; the rest is named in one line on stderr.

    Links that lead nowhere, pipes, sockets and devices are left out, too. Raises UserError if nothing is left; `kind`
    is what it calls that, and `mend` how it ends.
    """
    chosen: list[Path] = []
    left_out: list[str] = []
    for path in sorted(files_below(folder), key=os.fsencode):
        name = path.relative_to(folder).as_posix()
        try:
            if reason := kind_of(path):
                left_out.append(f"{name} ({reason})")
            elif wanted(path):
                chosen.append(path)
            else:
                left_out.append(name)
        except OSError as error:
            left_out.append(f"{name} ({error.strerror})")
    told = ", ".join(left_out[:MOST_NAMED]) + ", …" * (len(left_out) > MOST_NAMED)
    if not chosen:
        raise UserError(f"there is no {kind} in {folder}{told and f', only {told}'}; {mend}")
    if left_out and is_first_process():
        say(f"{folder}: left out what is no {kind}, {len(left_out)} in all: {told}")
    return chosen


def image_files(folder: Path, mend: str = MEND) -> list[Path]:
    """The images below `folder`, in order of name: files with the name or with the first bytes of one.

    What is named as an image is taken whatever it holds: if that is no image, whoever decodes it says so.
    """
    return choose_files(folder, is_image, IMAGE, mend)


def is_image(path: Path) -> bool:
    """Whether a file is a JPEG, PNG or WebP by its name or by its first bytes. Raises OSError."""
    if path.suffix.lower().lstrip(".") in EXTENSIONS:
        return True
    with path.open("rb") as file:
        start = file.read(12)
    return start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (start[:4], start[8:]) == (b"RIFF", b"WEBP")


def find_sources(photos: Sequence[str | Path], without: Path) -> list[Source]:
    """All files in the folders and files `photos`, in order of name, each once.

    Names and keys depend on the paths below each folder only, not on where the folder lies; a file that has several
    has the first by name in the folder that was named first. What is no file but lies in a folder, such as a link to
    nothing or a pipe, is among them. Raises `UserError` for a path that is no file or folder, and if there is no file
    at all.
    """
    found: dict[str, tuple[int, bytes, str, Path]] = {}
    for number, given in enumerate(map(Path, photos)):
        for path, name in _named(given, without):
            named = number, os.fsencode(name), name, path
            real = os.path.realpath(path)  # Path.resolve would raise for a link to itself
            found[real] = min(named, found.get(real, named))
    if not found:
        raise UserError(f"there is no file in {', '.join(map(str, photos))}; name a folder of photos")
    taken: dict[str, int] = {}
    ordered = sorted(found.values(), key=lambda item: item[1])
    return [Source(path, name, unique_key(name, taken), size_of(path)) for *_, name, path in ordered]


def _named(given: Path, without: Path) -> Iterator[tuple[Path, str]]:
    """The files of a path that the user named, and their names below it."""
    if given.is_dir():
        for path in files_below(given, without):
            yield path, path.relative_to(given).as_posix()
    else:
        check_file(given)
        yield given, given.name


def check_file(path: Path) -> None:
    """Raise UserError unless a path that the user named is a file."""
    try:
        kind = kind_of(path)
    except FileNotFoundError:
        raise UserError(f"there is no file or folder {path}; check the path") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); check the path") from None
    if kind:
        raise UserError(f"{path} is {kind}, not a file; name a file or a folder")


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
    """Bytes of a file; 0 for what is none."""
    try:
        return 0 if kind_of(path) else path.stat().st_size
    except OSError:  # a link to nothing: reported when it is read
        return 0


# Images of a folder, whole, for evaluation.


REMEDY = "name a folder of images (eval.images in training, --images in evaluation)"


class ImageSet:
    """The JPEG, PNG and WebP files below a folder (`sources.image_files`), in order of name.

    `names` are their paths below the folder, as they are shown. Raises `UserError` if the folder is missing or holds
    none.
    """

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"there is no folder {folder}; {REMEDY}")
        self._paths = image_files(self.folder, REMEDY)[:limit]
        self.names = [shown(path.relative_to(self.folder).as_posix()) for path in self._paths]

    def __len__(self) -> int:
        return len(self.names)

    def load(self, i: int) -> torch.Tensor:
        """Image `i` as RGB, uint8 (3, H, W). Raises `UserError` if it is broken, or has not its size in `sizes`."""
        pixels = read_image(self._paths[i])
        known = self.__dict__.get("sizes")
        if known and pixels.shape[1:] != known[i]:
            (height, width), (before_height, before_width) = pixels.shape[1:], known[i]
            raise UserError(
                f"{self._paths[i]} was {before_width}×{before_height} pixels at the start and is {width}×{height} now; "
                "put the image back that was there"
            )
        return pixels

    @cached_property
    def sizes(self) -> list[torch.Size]:
        """Height and width of every image; all are decoded for it, once. Raises `UserError` if one is broken."""
        return [self.load(i).shape[1:] for i in range(len(self))]


def check_size(size: torch.Size, name: str, mend: str, *, smallest: int, who: str) -> None:
    """Raise UserError, which names the image and ends with `mend`, if its height or width is below `smallest`."""
    height, width = size
    if min(height, width) < smallest:
        raise UserError(f"{name} is {width}×{height} pixels, and {who} images with sides from {smallest}; {mend}")


def read_image(path: Path, background: Colour | None = BACKGROUND) -> torch.Tensor:
    """A JPEG, PNG or WebP file as RGB, uint8 (3, H, W), by the rule of `images.to_rgb`.

    Raises `UserError` if it is broken, `TransparentImage` as that rule does.
    """
    try:
        return torch.from_numpy(to_array(decode(read_file(path), background)))
    except TransparentImage:
        raise
    except (ValueError, OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "not enough memory"
        raise UserError(f"cannot read {path} ({reason}); mend or remove it") from error
