"""Crops where a codec errs most, beside the originals and the nearest other codec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hpcm_scale.evaluation.coders import Watcher
from hpcm_scale.evaluation.measures import Estimated, Measured
from hpcm_scale.formatting import label, new_figure, save

CROP = 256
"""Sides of a crop in pixels of the image; smaller images are shown whole."""
STRIDE = 32
"""Crops are tried at multiples of so many pixels."""
RULE = (
    "Of each image the crop with the largest squared error, then the images where it is largest.\n"
    "Rates and PSNR are those of the whole image."
)
NEAREST = " Right: of the other codecs and settings, the one whose rate is nearest to ours."

# In pixels of the picture: pixels of a crop become squares of a whole number.
SIDE = 512
CAPTION_HEIGHT = 52
TITLE_HEIGHT = 92
GAP = 12
DPI = 100


class Window(NamedTuple):
    """A place in an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, pixels: Tensor) -> Tensor:
        """Copy this place out of (3, H, W)."""
        return pixels[:, self.top : self.top + self.height, self.left : self.left + self.width].clone()


class Panel(NamedTuple):
    """What one codec made of a crop."""

    codec: str
    pixels: Tensor
    """uint8 (3, height, width)."""
    measured: Measured
    """Of the whole image."""


@dataclass
class Crop:
    """One place in one image."""

    window: Window
    error: float
    """Mean squared error of ours in it, in 8-bit levels."""
    original: Tensor
    ours: Panel
    nearest: Panel | None = None
    """The other codec, at the setting whose bpp of this image is nearest to ours; the first of equals."""


class Crops:
    """Chooses crops while codecs are at work: first `ours`, on every image, then any number of `other`s.

    One crop per image: the `CROP`×`CROP` window with the largest squared error of ours (the first of equals, by
    rows); of all images the `number` where it is largest (the first of equals).
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._chosen: dict[int, Crop] = {}
        self._ours: str | None = None

    def ours(self, codec: str) -> Watcher:
        """The watcher of our codec, under the name that is written above its crops: the first that is asked for."""
        self._ours = self._ours or codec

        def watch(index: int, original: Tensor, decoded: Tensor, measured: Measured) -> None:
            if codec != self._ours:
                return
            window, error = worst_window(original, decoded)
            self._chosen[index] = Crop(window, error, window.cut(original), Panel(codec, window.cut(decoded), measured))
            if len(self._chosen) > self.number:
                del self._chosen[min(self._chosen, key=lambda i: (self._chosen[i].error, -i))]

        return watch

    def other(self, codec: str) -> Watcher:
        """The watcher of another codec, under the name that is written above its crops."""

        def watch(index: int, original: Tensor, decoded: Tensor, measured: Measured) -> None:
            crop = self._chosen.get(index)
            if crop and (crop.nearest is None or _distance(crop, measured) < _distance(crop, crop.nearest.measured)):
                crop.nearest = Panel(codec, crop.window.cut(decoded), measured)

        return watch

    def chosen(self) -> list[Crop]:
        """The crops, largest error first."""
        return [self._chosen[i] for i in sorted(self._chosen, key=lambda i: (-self._chosen[i].error, i))]


def worst_window(original: Tensor, decoded: Tensor) -> tuple[Window, float]:
    """Where two images, uint8 (3, H, W), differ most, and the mean squared error there in 8-bit levels."""
    errors = (original.double() - decoded.double()).square().sum(dim=0)  # whole numbers: the sums are exact
    height, width = (min(CROP, side) for side in errors.shape)
    tops, lefts = (_starts(side, window) for side, window in zip(errors.shape, (height, width), strict=True))
    sums = F.pad(errors, (1, 0, 1, 0)).cumsum(0).cumsum(1)
    bottoms, rights = tops + height, lefts + width
    boxes = sums[bottoms][:, rights] - sums[tops][:, rights] - sums[bottoms][:, lefts] + sums[tops][:, lefts]
    row, column = divmod(int(boxes.argmax()), len(lefts))
    window = Window(int(tops[row]), int(lefts[column]), height, width)
    return window, boxes[row, column].item() / (3 * height * width)


def _starts(side: int, window: int) -> Tensor:
    """Multiples of the stride, and the last place where a window fits."""
    last = side - window
    return torch.tensor(sorted({*range(0, last + 1, STRIDE), last}))


def _distance(crop: Crop, measured: Measured) -> float:
    return abs(measured.bpp - crop.ours.measured.bpp)


def draw_crops(crops: Sequence[Crop], path: str | Path, images: str) -> None:
    """One row per crop: the original, ours and, where there is one, the nearest other codec at its rate.

    `images` says which they come from; `path` ends in .png, .jpg, .webp or another suffix of a picture.
    """
    columns = 3 if any(crop.nearest for crop in crops) else 2
    rows = [_panels(crop)[:columns] for crop in crops]
    heights = [max(image.height for image, _ in row) for row in rows]
    width = columns * (SIDE + GAP) + GAP
    height = TITLE_HEIGHT + sum(heights) + len(rows) * (CAPTION_HEIGHT + GAP)
    with new_figure(figsize=(width / DPI, height / DPI), dpi=DPI) as figure:
        title = f"Where {label(crops[0].ours.codec)} errs most: {label(images)}"
        rule = RULE + (NEAREST if columns == 3 else "")
        figure.text(0.5, 1 - 26 / height, title, fontsize=14, fontweight="bold", ha="center", va="center")
        figure.text(0.5, 1 - 64 / height, rule, fontsize=10, color="0.3", ha="center", va="center", linespacing=1.4)
        bottom = height - TITLE_HEIGHT
        for row, tall in zip(rows, heights, strict=True):
            bottom -= CAPTION_HEIGHT + tall
            for column, (image, caption) in enumerate(row):
                middle = GAP + column * (SIDE + GAP) + SIDE / 2
                left = round(middle - image.width / 2)
                axes = figure.add_axes((left / width, bottom / height, image.width / width, image.height / height))
                axes.imshow(image, aspect="auto", interpolation="none")
                axes.set_axis_off()
                caption_height = (bottom + tall + CAPTION_HEIGHT * 0.45) / height
                figure.text(middle / width, caption_height, caption, fontsize=11, ha="center", va="center")
            bottom -= GAP
        save(figure, path)


def _panels(crop: Crop) -> list[tuple[Image.Image, str]]:
    """The pictures of one row and what is written above each."""
    window, measured = crop.window, crop.ours.measured
    place = f"{window.width}×{window.height} of {measured.width}×{measured.height}, at ({window.left}, {window.top})"
    panels = [(_shown(crop.original), f"{label(measured.name)}\n{place}")]
    for panel in (crop.ours, crop.nearest):
        if panel:
            estimated = " (estimated)" if isinstance(panel.measured, Estimated) else ""
            rate = f"{panel.measured.bpp:.3f} bpp{estimated}"
            if panel.measured.psnr is not None:
                rate += f", {panel.measured.psnr:.2f} dB"
            panels.append((_shown(panel.pixels), f"{label(panel.codec)}\n{rate}"))
    return panels


def _shown(pixels: Tensor) -> Image.Image:
    """A crop, uint8 (3, H, W), its pixels magnified to squares."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    times = SIDE // max(image.size)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
