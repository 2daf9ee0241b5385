"""Text recognition on decoded images: labelled images of text and the character error rate."""

from __future__ import annotations

import csv
import hashlib
import string
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hpcm_scale.data.sources import read_image
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.bd_rate import Scale
from hpcm_scale.machine.extractor import TokenExtractor
from hpcm_scale.machine.measures import Metric, TaskMeasure
from hpcm_scale.machine.recogniser import TextRecogniser
from hpcm_scale.tracking.progress import progress

LABELS = "labels.csv"
"""Table of the lines of text, in the folder of the images."""
BOX = ("left", "top", "width", "height")
FORM = f"{LABELS} has the columns file, text and, for images of several lines, {', '.join(BOX)} (pixels)"


class TextLine(NamedTuple):
    """A line of text in an image; the box is in pixels."""

    left: int
    top: int
    width: int
    height: int
    text: str

    def cut(self, pixels: Tensor) -> Tensor:
        """Crop (3, H, W) to this line."""
        return pixels[:, self.top : self.top + self.height, self.left : self.left + self.width]


class TextImages(ABC):
    """A set of images with text; each is coded as a whole, and its lines are cropped from the decoded image."""

    names: list[str]
    source: str
    """Title of the set."""

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def load(self, i: int) -> Tensor:
        """Image `i` as RGB, uint8 (3, H, W)."""

    @abstractmethod
    def lines(self, i: int) -> Sequence[TextLine]:
        """The lines of image `i`."""


class LabelledImages(TextImages):
    """Images in a folder, with their lines in a table.

    Its columns are `file`, `text` and, for images of several lines, `left`, `top`, `width`, `height`; without these the
    whole image is one line. Raises UserError for a wrong table or image.
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
                height, width = sizes[row["file"]]
                self._lines[row["file"]].append(_line(row, height, width, f"{labels}, line {number}"))

    def load(self, i: int) -> Tensor:
        return self._load(self.names[i])

    def lines(self, i: int) -> Sequence[TextLine]:
        """In the table's order."""
        return self._lines[self.names[i]]

    def _load(self, name: str) -> Tensor:
        path = self.folder / name
        if not path.is_file():
            raise UserError(
                "missing-labelled-image",
                "--images",
                f"{LABELS} lists {name}, which is not in {self.folder}; correct the table",
            )
        return read_image(path)


def scanned_page() -> LabelledImages | None:
    """A scanned page of a book from scikit-image (`skimage.data.page`); None if that is not installed.

    191×384 pixels, grey, unevenly lit; `scanned_page.csv` has the text of its seven complete lines.
    """
    package = find_spec("skimage")
    places = package and package.submodule_search_locations
    folder = Path(places[0], "data") if places else None
    if folder is None or not (folder / "page.png").is_file():
        return None
    page = LabelledImages(folder, Path(str(files("hpcm_scale.machine") / "scanned_page.csv")))
    page.source = "scanned page of scikit-image"
    return page


def digest(images: TextImages) -> str:
    """SHA-256 of pixels and lines, in hexadecimal; scores compare only between equal digests."""
    hashed = hashlib.sha256()
    for i in range(len(images)):
        hashed.update(images.load(i).numpy().tobytes())
        hashed.update(repr([tuple(line) for line in images.lines(i)]).encode())
    return hashed.hexdigest()


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            rows, columns = list(table), table.fieldnames or []
    except OSError as error:
        raise UserError("unreadable-labels", "--images", f"cannot read {path} ({error.strerror}); {FORM}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError("damaged-labels", "--images", f"{path} is not CSV in UTF-8 ({error}); {FORM}") from error
    missing = [name for name in ("file", "text") if name not in columns]
    if missing or 0 < len(set(BOX) & set(columns)) < len(BOX):
        raise UserError(
            "columns-of-labels", "--images", f"{path} has the columns {', '.join(columns) or '(none)'}; {FORM}"
        )
    if not rows:
        raise UserError("empty-labels", "--images", f"{path} lists no images; {FORM}")
    return rows


def _line(row: dict[str, str], height: int, width: int, place: str) -> TextLine:
    if not "".join((row["text"] or "").split()):
        raise UserError(
            "line-without-text", "--images", f"{place}: the text is empty; write the text shown in the image"
        )
    if BOX[0] not in row:
        return TextLine(0, 0, width, height, row["text"])
    try:
        left, top, columns, rows = (int(row[name]) for name in BOX)
    except (TypeError, ValueError) as error:
        raise UserError(
            "box-without-pixels", "--images", f"{place}: {', '.join(BOX)} must be whole numbers of pixels; correct them"
        ) from error
    if min(left, top) < 0 or min(columns, rows) < 1 or left + columns > width or top + rows > height:
        raise UserError(
            "box-outside-image",
            "--images",
            f"{place}: the box is not inside the image of {width}×{height} pixels; correct it",
        )
    return TextLine(left, top, columns, rows, row["text"])


# Rendered images of text.


WIDTH, HEIGHT = 768, 512
FONTS = (
    *("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf"),
    *("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf"),
)
"""Fonts that matplotlib ships; Pillow's default font is one more."""
SMALLEST, LARGEST = 9, 22
"""Font sizes in pixels per em: 7 to 16 points at 96 pixels per inch."""
CONTRAST = (2.5, 15.0)
"""Range of the contrast ratio of the text to its background (WCAG 2: 1 to 21)."""
MARGIN = 3
"""Pixels of background around the letters of a line."""
LONGEST = 32
"""Most characters of a line."""


class RenderedText(TextImages):
    """Images of 768×512 pixels with short lines of English words and numbers.

    Fonts, sizes, colours and contrast vary by line. Backgrounds are noise in two colours with the spectrum of natural
    images (amplitude 1/frequency^1.2; Field 1987), from weak to strong. Image i depends only on i, the seed and the
    versions of the fonts and of Pillow; scores compare only between equal digests (`digest`).
    """

    source = "rendered lines"

    def __init__(self, count: int, seed: int = 7) -> None:
        """`seed`: use another one for training images."""
        self._seed = seed
        self.names = [f"rendered {i + 1:02d}" for i in range(count)]

    def load(self, i: int) -> Tensor:
        return self._rendered[i][0]

    def lines(self, i: int) -> Sequence[TextLine]:
        """From the top, from the left."""
        return self._rendered[i][1]

    @cached_property
    def _rendered(self) -> list[tuple[Tensor, list[TextLine]]]:
        return [_render(np.random.default_rng((self._seed, i))) for i in range(len(self))]


def _render(random: np.random.Generator) -> tuple[Tensor, list[TextLine]]:
    image = Image.fromarray(background(random))
    draw, lines, top = ImageDraw.Draw(image), [], int(random.integers(4, 12))
    while top + 2 * LARGEST < HEIGHT:
        left, tallest = int(random.integers(4, 60)), 0
        while True:
            font, text = _font(random), phrase(random)
            over = font.getbbox(text)  # of the letters, from the pen's place
            width, height = (round(over[k + 2] - over[k]) + 2 * MARGIN for k in (0, 1))
            if left + width > WIDTH:
                break
            box = TextLine(left, top, width, height, text)
            colour = _colour(random, np.asarray(image)[top : top + height, left : left + width])
            draw.text((left + MARGIN - over[0], top + MARGIN - over[1]), text, font=font, fill=colour)
            lines.append(box)
            left, tallest = left + width + int(random.integers(6, 30)), max(tallest, height)
        top += tallest + int(random.integers(2, 8))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous(), lines


def background(random: np.random.Generator) -> np.ndarray:
    """Two colours mixed by noise, and weak noise per channel: uint8 (HEIGHT, WIDTH, 3)."""
    strength = random.uniform(0.05, 0.3)
    dark, light = np.sort(random.uniform(0, 1, 2)) + np.array([-0.5, 0.5]) * strength
    tint = random.uniform(-0.12, 0.12, (2, 3))
    mix = np.clip(0.5 + pink_noise(random) / 4, 0, 1)[..., None]
    colours = (dark + tint[0]) * (1 - mix) + (light + tint[1]) * mix
    own = np.stack([pink_noise(random) for _ in range(3)], axis=-1)
    return np.rint(255 * np.clip(colours + 0.05 * strength * own, 0, 1)).astype(np.uint8)


def pink_noise(random: np.random.Generator) -> np.ndarray:
    """Noise with amplitude 1/frequency^1.2, mean 0, variance 1, periodic: float64 (HEIGHT, WIDTH)."""
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH))
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(np.fft.rfft2(random.standard_normal((HEIGHT, WIDTH))) / frequency**1.2, s=(HEIGHT, WIDTH))
    return noise / noise.std()


def phrase(random: np.random.Generator) -> str:
    """One to four words or numbers, at most `LONGEST` characters."""
    words = [_number(random) if random.random() < 0.2 else _word(random) for _ in range(random.integers(1, 5))]
    while len(" ".join(words)) > LONGEST:
        words.pop()
    return " ".join(words)


def _word(random: np.random.Generator) -> str:
    word = random.choice(_WORDS)
    return str(random.choice([word, word, word.capitalize(), word.upper()]))


def _number(random: np.random.Generator) -> str:
    """A count, a price, a date, a time or a code."""
    a, b, c = (int(n) for n in random.integers(10, 99, 3))
    code = f"{string.ascii_uppercase[a % 26]}{b}{c}"
    return str(random.choice([f"{a}{b}", f"{a}.{b}", f"20{a}-{b % 12 + 1:02d}", f"{a % 24}:{b % 60:02d}", code]))


def _font(random: np.random.Generator) -> ImageFont.FreeTypeFont:
    size = int(random.integers(SMALLEST, LARGEST + 1))
    i = int(random.integers(len(FONTS) + 1))
    if i == len(FONTS):
        return ImageFont.load_default(size)  # pyright: ignore[reportReturnType]
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", FONTS[i]), size)


def _colour(random: np.random.Generator, behind: np.ndarray) -> tuple[int, ...]:
    """A colour with a contrast within `CONTRAST` to the background (h, w, 3): darker on light, lighter on dark."""
    behind = behind.reshape(-1, 3)
    ground = _luminance(behind).mean()
    contrast = np.exp(random.uniform(*np.log(CONTRAST)))
    darker, lighter = (ground + 0.05) / contrast - 0.05, (ground + 0.05) * contrast - 0.05
    aim = np.clip(darker if ground > 0.2 else lighter, 0, 1)
    hue = random.uniform(0.3, 1, 3)
    shades = np.clip(np.linspace(0, 3.5, 256)[:, None] * hue, 0, 1) * 255
    return tuple(int(value) for value in shades[np.abs(_luminance(shades) - aim).argmin()])


def _luminance(colours: np.ndarray) -> np.ndarray:
    """Relative luminance (WCAG 2) of colours (n, 3) in 0 … 255: (n,) in 0 … 1."""
    values = colours / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


_WORDS = (files("hpcm_scale.machine") / "words.txt").read_text(encoding="utf-8").split()


# Character error rate.


HIGHEST = 48
"""Pixels; higher lines are resized to this height, since recognisers split them into several lines."""
CER = Metric(
    "cer",
    "CER",
    4,
    "character error rate: Levenshtein distance of the recognised to the true text, summed over all lines, divided by "
    "the number of true characters; without spaces, after Unicode normalization (NFKC)",
    Scale("correct characters, 100·(1 − CER)", "%"),
    lambda rate: 100 * (1 - rate),
)
ERRORS = Metric("errors", "errors", 0, "that distance, summed over the lines of an image")
CHARACTERS = Metric("characters", "characters", 0, "true characters of an image")


class Reading(TaskMeasure):
    """Character error rate of a recogniser on the lines of a set of images, cropped after decoding.

    Raises UserError if rapidfuzz is missing, and if the receiver is no recogniser.
    """

    task = "text"
    metrics = (CER, ERRORS, CHARACTERS)

    def __init__(self, recogniser: TokenExtractor, images: TextImages, device: torch.device) -> None:
        if not isinstance(recogniser, TextRecogniser):
            raise UserError(
                "receiver-without-text",
                "--receivers",
                f"{recogniser.name} does not read text; choose recognisers with --receivers",
            )
        _levenshtein("", "")
        super().__init__(recogniser.name)
        self._recogniser, self._images, self._device = recogniser.to(device), images, device

    def score(self, index: int, original: Tensor, decoded: Tensor) -> dict[str, float]:
        """See `TaskMeasure.score`; the reference is the true text, not the original image."""
        errors = characters = 0
        for line in self._images.lines(index):
            truth = normalised(line.text)
            errors += _levenshtein(normalised(self._read(line.cut(decoded))), truth)
            characters += len(truth)
        return _rate(errors, characters)

    def mean(self, scores: Sequence[dict[str, float]]) -> dict[str, float]:
        """Errors of all images divided by characters of all images."""
        return _rate(sum(score["errors"] for score in scores), sum(score["characters"] for score in scores))

    def of_originals(self) -> dict[str, float]:
        """See `TaskMeasure.of_originals`: the errors of the recogniser on uncoded images."""
        indices = progress(
            range(len(self._images)), description=f"{self.receiver} reads {self._images.source}", unit="image"
        )
        originals = ((i, self._images.load(i)) for i in indices)
        return self.mean([self.score(i, pixels, pixels) for i, pixels in originals])

    def _read(self, pixels: Tensor) -> str:
        x = pixels[None].to(self._device).float() / 255
        height, width = x.shape[2:]
        if height > HIGHEST:
            x = F.interpolate(x, (HIGHEST, max(1, round(width * HIGHEST / height))), mode="bilinear", antialias=True)
        return self._recogniser.read(x)[0]


def normalised(text: str) -> str:
    """Text without spaces, which recognisers often omit, after Unicode normalization (NFKC)."""
    return "".join(unicodedata.normalize("NFKC", text).split())


def _rate(errors: float, characters: float) -> dict[str, float]:
    return {"cer": errors / characters, "errors": errors, "characters": characters}


def _levenshtein(read: str, truth: str) -> int:
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise UserError(
            "no-rapidfuzz", "--task", "--task text needs the package rapidfuzz; install hpcm-scale[machine]"
        ) from error
    return Levenshtein.distance(read, truth)
