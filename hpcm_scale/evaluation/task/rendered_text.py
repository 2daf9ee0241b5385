"""Pictures of text made here: seeded, so that every evaluation has the same ones."""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hpcm_scale.evaluation.task.text_pictures import TextLine

WIDTH, HEIGHT = 768, 512
FONTS = (
    *("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf"),
    *("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf"),
)
"""Files that matplotlib ships; Pillow's own scalable font comes beside them."""
SMALLEST, LARGEST = 9, 22
"""Sizes of fonts in pixels per em: on paper at 96 pixels per inch, 7 to 16 points."""
CONTRAST = (2.5, 15.0)
"""Least and largest contrast ratio of the text to its background (WCAG 2: 1 to 21)."""
MARGIN = 3
"""Pixels of background around the letters of a line."""
LONGEST = 32
"""Characters of a line."""


class RenderedText:
    """Pictures of 768×512 pixels full of short lines: English words and numbers.

    Fonts, sizes, colours and contrast differ from line to line. Backgrounds are noise in two colours with the spectrum
    of natural images (amplitude 1/frequency^1.2; Field 1987), from nearly smooth to strong. Picture i depends on i
    and the seed alone, and on the versions of the fonts and of Pillow: compare numbers only where
    `text_pictures.digest` is equal.
    """

    source = "rendered lines"

    def __init__(self, count: int, seed: int = 7) -> None:
        """`seed`: another one for pictures to train on."""
        self._seed = seed
        self.names = [f"rendered {i + 1:02d}" for i in range(count)]

    def __len__(self) -> int:
        return len(self.names)

    def load(self, i: int) -> Tensor:
        """Picture `i` as RGB, uint8 (3, H, W)."""
        return self._pictures[i][0]

    def lines(self, i: int) -> Sequence[TextLine]:
        """The lines of picture `i`, from the top, from the left."""
        return self._pictures[i][1]

    @cached_property
    def _pictures(self) -> list[tuple[Tensor, list[TextLine]]]:
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
    """Two colours mixed by noise, a little of it in every channel of its own: uint8 (HEIGHT, WIDTH, 3)."""
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
        return ImageFont.load_default(size)
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", FONTS[i]), size)


def _colour(random: np.random.Generator, behind: np.ndarray) -> tuple[int, ...]:
    """A colour with a contrast within `CONTRAST` to what is behind it, (h, w, 3): darker on light, lighter on dark."""
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


_WORDS = (files("hpcm_scale.evaluation.task") / "words.txt").read_text(encoding="utf-8").split()
