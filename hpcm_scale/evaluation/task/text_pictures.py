"""Pictures of text whose words are known: what they look like to `code_images`, and where the lines are."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from hpcm_scale.data.image_set import read_image
from hpcm_scale.errors import UserError

LABELS = "labels.csv"
"""Beside pictures of text: what is written on them."""
BOX = ("left", "top", "width", "height")
FORM = f"{LABELS} has the columns file, text and, for pictures of several lines, {', '.join(BOX)} (pixels)"


class TextLine(NamedTuple):
    """A line of text in a picture; the box is in pixels."""

    left: int
    top: int
    width: int
    height: int
    text: str

    def cut(self, pixels: Tensor) -> Tensor:
        """This line's part of (3, H, W)."""
        return pixels[:, self.top : self.top + self.height, self.left : self.left + self.width]


class TextPictures(Protocol):
    """A set of pictures, to be coded whole; lines are cut out of what was decoded."""

    source: str
    """Where they come from, in a few words."""
    names: Sequence[str]

    def __len__(self) -> int: ...

    def load(self, i: int) -> Tensor:
        """Picture `i` as RGB, uint8 (3, H, W)."""
        ...

    def lines(self, i: int) -> Sequence[TextLine]:
        """The lines of picture `i`."""
        ...


class LabelledPictures:
    """Pictures in a folder, with their lines in a table.

    Its columns are `file` and `text` and, where a picture has several lines, `left`, `top`, `width`, `height`; without
    these the whole picture is one line. Raises UserError for a table or a picture that cannot be used.
    """

    def __init__(self, folder: str | Path, labels: str | Path | None = None, limit: int | None = None) -> None:
        self.folder = Path(folder)
        labels = self.folder / LABELS if labels is None else Path(labels)
        self.source = f"lines of {labels}"
        rows = _read(labels)
        self.names = sorted({row["file"] for row in rows})[:limit]
        sizes = {name: self._load(name).shape[1:] for name in self.names}
        self._lines: Mapping[str, list[TextLine]] = {name: [] for name in self.names}
        for number, row in enumerate(rows, start=2):
            if row["file"] in sizes:
                self._lines[row["file"]].append(_line(row, *sizes[row["file"]], f"{labels}, line {number}"))

    def __len__(self) -> int:
        return len(self.names)

    def load(self, i: int) -> Tensor:
        """Picture `i` as RGB, uint8 (3, H, W)."""
        return self._load(self.names[i])

    def lines(self, i: int) -> Sequence[TextLine]:
        """The lines of picture `i`, in the table's order."""
        return self._lines[self.names[i]]

    def _load(self, name: str) -> Tensor:
        path = self.folder / name
        if not path.is_file():
            raise UserError(f"{LABELS} names {name}, but there is no such file in {self.folder}; mend the table")
        return read_image(path)


def scanned_page() -> LabelledPictures | None:
    """The photographed page of a book that scikit-image ships (`skimage.data.page`); None where it is not installed.

    191×384 pixels, grey, lit from one side; its seven whole lines were typed for `scanned_page.csv` beside this file.
    """
    package = find_spec("skimage")
    folder = package and package.submodule_search_locations and Path(package.submodule_search_locations[0], "data")
    if not folder or not (folder / "page.png").is_file():
        return None
    page = LabelledPictures(folder, Path(str(files("hpcm_scale.evaluation.task") / "scanned_page.csv")))
    page.source = "scanned page of scikit-image"
    return page


def digest(pictures: TextPictures) -> str:
    """SHA-256 of the pixels and the lines of pictures, in hexadecimal: the same pictures give comparable numbers."""
    hashed = hashlib.sha256()
    for i in range(len(pictures)):
        hashed.update(pictures.load(i).numpy().tobytes())
        hashed.update(repr([tuple(line) for line in pictures.lines(i)]).encode())
    return hashed.hexdigest()


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            rows, columns = list(table), table.fieldnames or []
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {FORM}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no table of comma-separated values in UTF-8 ({error}); {FORM}") from error
    missing = [name for name in ("file", "text") if name not in columns]
    if missing or 0 < len(set(BOX) & set(columns)) < len(BOX):
        raise UserError(f"{path} has the columns {', '.join(columns) or '(none)'}; {FORM}")
    if not rows:
        raise UserError(f"{path} names no picture; {FORM}")
    return rows


def _line(row: dict[str, str], height: int, width: int, place: str) -> TextLine:
    if not "".join((row["text"] or "").split()):
        raise UserError(f"{place}: the text is empty, so there is nothing to read; write what is on the picture")
    if BOX[0] not in row:
        return TextLine(0, 0, width, height, row["text"])
    try:
        left, top, columns, rows = (int(row[name]) for name in BOX)
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: {', '.join(BOX)} must be whole numbers of pixels; mend them") from error
    if min(left, top) < 0 or min(columns, rows) < 1 or left + columns > width or top + rows > height:
        raise UserError(f"{place}: the box is not inside the picture, which is {width}×{height} pixels; mend it")
    return TextLine(left, top, columns, rows, row["text"])
