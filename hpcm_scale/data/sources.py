"""Image files: finding them, naming them in a set of shards, and loading them for evaluation."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from hpcm_scale.data.images import BACKGROUND, EXTENSIONS, Colour, TransparentImage, decode, extension_of, to_array
from hpcm_scale.errors import UserError, is_first_process, print_message, printable
from hpcm_scale.files import read_file, special_kind

IMAGE = "JPEG, PNG or WebP image"
MOST_NAMED = 5
"""Skipped files named in a message."""

LONGEST_KEY = 80
"""Characters; with a suffix for uniqueness it fits the 100 of a tar header."""


@dataclass(frozen=True)
class Source:
    """A file that was named or found."""

    path: Path
    name: str
    """Path relative to the named folder, with forward slashes."""
    key: str
    size: int
    """Bytes."""


def files_below(folder: Path, without: Path | None = None) -> Iterator[Path]:
    """All files below `folder`, links followed once, except those in the folder `without`.

    Subfolders that cannot be read are yielded like files. Raises UserError if `folder` itself cannot be read.
    """
    seen = set() if without is None else {os.path.realpath(without)}
    unreadable: list[Path] = []

    def refuse(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise UserError(
                "unreadable-folder", "", f"cannot read the folder {folder} ({error.strerror}); check its permissions"
            )
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


def choose_files(
    folder: Path, wanted: Callable[[Path], bool], kind: str, remedy: str = "give a folder with some"
) -> list[Path]:
    """The files below `folder` that are `wanted`, sorted by name; the others are listed in one line on stderr.

    Broken links, pipes, sockets and devices are skipped, too. Raises UserError if no file remains; `kind` names the
    wanted files in it, and `remedy` ends the sentence.
    """
    chosen: list[Path] = []
    skipped: list[str] = []
    for path in sorted(files_below(folder), key=os.fsencode):
        name = path.relative_to(folder).as_posix()
        try:
            if reason := special_kind(path):
                skipped.append(f"{name} ({reason})")
            elif wanted(path):
                chosen.append(path)
            else:
                skipped.append(name)
        except OSError as error:
            skipped.append(f"{name} ({error.strerror})")
    listed = ", ".join(skipped[:MOST_NAMED]) + ", …" * (len(skipped) > MOST_NAMED)
    if not chosen:
        raise UserError("no-files", "", f"there is no {kind} in {folder}{listed and f', only {listed}'}; {remedy}")
    if skipped and is_first_process():
        print_message(f"{folder}: skipped files that are not a {kind} ({len(skipped)}): {listed}")
    return chosen


def image_files(folder: Path, remedy: str = "give a folder with some") -> list[Path]:
    """The images below `folder`, sorted by name: files whose extension or first bytes are those of an image.

    A file with an image's extension is included whatever its content; decoding reports errors.
    """
    return choose_files(folder, is_image, IMAGE, remedy)


def is_image(path: Path) -> bool:
    """Whether a file is a JPEG, PNG or WebP by its name or by its first bytes. Raises OSError."""
    if path.suffix.lower().lstrip(".") in EXTENSIONS:
        return True
    with path.open("rb") as file:
        return extension_of(file.read(12)) is not None


def find_sources(images: Sequence[str | Path], without: Path) -> list[Source]:
    """All files in the folders and files `images`, sorted by name, each once, except those in the folder `without`.

    Names and keys depend only on the paths relative to each named folder. A file that is found several times gets the
    first name in the folder that was named first. Broken links, pipes and the like are included. Raises `UserError`
    for a path that is neither a file nor a folder, and if there is no file at all.
    """
    found: dict[str, tuple[int, bytes, str, Path]] = {}
    for number, given in enumerate(map(Path, images)):
        for path, name in _named(given, without):
            named = number, os.fsencode(name), name, path
            real = os.path.realpath(path)  # Path.resolve would raise for a link to itself
            found[real] = min(named, found.get(real, named))
    if not found:
        raise UserError(
            "empty-folder", "", f"there is no file in {', '.join(map(str, images))}; give a folder of images"
        )
    taken: dict[str, int] = {}
    ordered = sorted(found.values(), key=lambda item: item[1])
    return [Source(path, name, unique_key(name, taken), size_of(path)) for *_, name, path in ordered]


def _named(given: Path, without: Path) -> Iterator[tuple[Path, str]]:
    """The files of a named path, and their names relative to it."""
    if given.is_dir():
        for path in files_below(given, without):
            yield path, path.relative_to(given).as_posix()
    else:
        check_file(given)
        yield given, given.name


def check_file(path: Path) -> None:
    """Raise UserError unless a path is a file."""
    try:
        kind = special_kind(path)
    except FileNotFoundError:
        raise UserError("no-such-file", "", f"there is no file or folder {path}; check the path") from None
    except OSError as error:
        raise UserError("unreadable-path", "", f"cannot read {path} ({error.strerror}); check the path") from None
    if kind:
        raise UserError("not-a-file", "", f"{path} is {kind}; give a file or a folder")


def unique_key(name: str, taken: dict[str, int]) -> str:
    """A key from a file's name: ASCII, without dots (webdataset splits keys there), not yet in `taken`.

    `trips/Über uns.JPG` becomes `trips/ber_uns`; a second file of the same key gets `-2`, and so on.
    """
    parts = re.sub(r"\.[^./]*$", "", name).split("/")
    parts = [re.sub(r"[^A-Za-z0-9-]+", "_", part).strip("_") or "image" for part in parts]
    plain = "/".join(parts)[-LONGEST_KEY:].lstrip("/_")
    key = plain
    while key in taken:
        taken[plain] += 1
        key = f"{plain}-{taken[plain]}"
    taken[key] = 1
    return key


def size_of(path: Path) -> int:
    """Bytes of a file; 0 for anything else."""
    try:
        return 0 if special_kind(path) else path.stat().st_size
    except OSError:  # a broken link: reported when it is read
        return 0


# Whole images for evaluation.

REMEDY = "give a folder of images (eval.images in training, --images in evaluation)"


class ImageSet:
    """The JPEG, PNG and WebP files below a folder (`image_files`), sorted by name; at most `limit` of them.

    `names` are their paths relative to the folder. Raises `UserError` if the folder is missing or holds no image.
    """

    def __init__(self, folder: str | Path, limit: int | None = None) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError("no-image-folder", "eval.images", f"there is no folder {folder}; {REMEDY}")
        self._paths = image_files(self.folder, REMEDY)[:limit]
        self.names = [printable(path.relative_to(self.folder).as_posix()) for path in self._paths]

    def __len__(self) -> int:
        return len(self.names)

    def load(self, i: int) -> torch.Tensor:
        """Image `i` as RGB, uint8 (3, H, W). Raises `UserError` if it is broken or its size has changed."""
        pixels = read_image(self._paths[i])
        known = self.__dict__.get("sizes")
        if known and pixels.shape[1:] != known[i]:
            (height, width), (old_height, old_width) = pixels.shape[1:], known[i]
            raise UserError(
                "image-changed",
                "eval.images",
                f"{self._paths[i]} had {old_width}×{old_height} pixels at the start and now has {width}×{height}; "
                "restore the original image",
            )
        return pixels

    @cached_property
    def sizes(self) -> list[torch.Size]:
        """Height and width of every image; decodes all of them once. Raises `UserError` if one is broken."""
        return [self.load(i).shape[1:] for i in range(len(self))]


def check_size(size: torch.Size, name: str, remedy: str, *, smallest: int, who: str) -> None:
    """Raise UserError, which names the image and ends with `remedy`, if its height or width is below `smallest`."""
    height, width = size
    if min(height, width) < smallest:
        raise UserError(
            "image-too-small",
            "",
            f"{name} is {width}×{height} pixels, but {who} images with sides of at least {smallest}; {remedy}",
        )


def read_image(path: Path, background: Colour | None = BACKGROUND) -> torch.Tensor:
    """Decode a JPEG, PNG or WebP file to RGB, uint8 (3, H, W), by the rule of `images.to_rgb`.

    Raises `UserError` if it is broken, and `TransparentImage` as that rule does.
    """
    try:
        return torch.from_numpy(to_array(decode(read_file(path), background)))
    except TransparentImage:
        raise
    except (ValueError, OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "not enough memory"
        raise UserError("broken-image", "", f"cannot read {path} ({reason}); replace or remove it") from error
