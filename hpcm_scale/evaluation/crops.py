"""visual.png: the crops with the largest error of a model, beside the originals and the nearest baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hpcm_scale.evaluation.measures import Estimated, Measured
from hpcm_scale.evaluation.runners import Watcher
from hpcm_scale.formatting import label, new_figure, save

CROP = 256
"""Side of a crop in pixels; smaller images are shown whole."""
STRIDE = 32
"""Positions of crops are multiples of this many pixels."""
RULE = (
    "The crop with the largest squared error of each image, for the images where it is largest.\n"
    "Rates and PSNR are of the whole image."
)
NEAREST = " Right: the baseline codec and setting with the nearest rate."

# In pixels of the figure; each pixel of a crop is a square of several pixels.
SIDE = 512
CAPTION_HEIGHT = 52
TITLE_HEIGHT = 92
GAP = 12
DPI = 100


class Window(NamedTuple):
    """A rectangle in an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, pixels: Tensor) -> Tensor:
        """A copy of this part of (3, H, W)."""
        return pixels[:, self.top : self.top + self.height, self.left : self.left + self.width].clone()


class Panel(NamedTuple):
    """A crop as one codec decodes it."""

    codec: str
    pixels: Tensor
    """uint8 (3, height, width)."""
    measured: Measured
    """For the whole image."""


@dataclass
class Crop:
    """One crop of one image."""

    window: Window
    error: float
    """Mean squared error of the model, in 8-bit levels."""
    original: Tensor
    model: Panel
    nearest: Panel | None = None
    """The baseline and setting with the nearest bpp on this image; the first of equals."""


class Crops:
    """Chooses crops while images are coded: first by the model, then by any number of baselines.

    One crop per image, the `CROP`×`CROP` window with the largest squared error of the model, for the `number` images
    where it is largest; the first of equals.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._chosen: dict[int, Crop] = {}
        self._model: str | None = None

    def watch_model(self, codec: str) -> Watcher:
        """The watcher of the model, titled `codec`; later calls with another title watch nothing."""
        self._model = self._model or codec

        def watch(index: int, original: Tensor, decoded: Tensor, measured: Measured) -> None:
            if codec != self._model:
                return
            window, error = worst_window(original, decoded)
            self._chosen[index] = Crop(window, error, window.cut(original), Panel(codec, window.cut(decoded), measured))
            if len(self._chosen) > self.number:
                del self._chosen[min(self._chosen, key=lambda i: (self._chosen[i].error, -i))]

        return watch

    def watch_baseline(self, codec: str) -> Watcher:
        """The watcher of a baseline, titled `codec`."""

        def watch(index: int, original: Tensor, decoded: Tensor, measured: Measured) -> None:
            crop = self._chosen.get(index)
            if crop and (crop.nearest is None or _distance(crop, measured) < _distance(crop, crop.nearest.measured)):
                crop.nearest = Panel(codec, crop.window.cut(decoded), measured)

        return watch

    def chosen(self) -> list[Crop]:
        """The crops, largest error first."""
        return [self._chosen[i] for i in sorted(self._chosen, key=lambda i: (-self._chosen[i].error, i))]


def worst_window(original: Tensor, decoded: Tensor) -> tuple[Window, float]:
    """The window where two images, uint8 (3, H, W), differ most, and its mean squared error in 8-bit levels."""
    errors = (original.double() - decoded.double()).square().sum(dim=0)  # integers: the sums are exact
    height, width = (min(CROP, side) for side in errors.shape)
    tops, lefts = (_starts(side, window) for side, window in zip(errors.shape, (height, width), strict=True))
    sums = F.pad(errors, (1, 0, 1, 0)).cumsum(0).cumsum(1)
    bottoms, rights = tops + height, lefts + width
    boxes = sums[bottoms][:, rights] - sums[tops][:, rights] - sums[bottoms][:, lefts] + sums[tops][:, lefts]
    row, column = divmod(int(boxes.argmax()), len(lefts))
    window = Window(int(tops[row]), int(lefts[column]), height, width)
    return window, boxes[row, column].item() / (3 * height * width)


def _starts(side: int, window: int) -> Tensor:
    """Multiples of the stride, and the last position where a window fits."""
    last = side - window
    return torch.tensor(sorted({*range(0, last + 1, STRIDE), last}))


def _distance(crop: Crop, measured: Measured) -> float:
    return abs(measured.bpp - crop.model.measured.bpp)


def draw_crops(crops: Sequence[Crop], path: str | Path, images: str) -> None:
    """Draw one row per crop: the original, the model and, if there is one, the nearest baseline.

    `images`: title of the set; the suffix of `path` sets the format.
    """
    columns = 3 if any(crop.nearest for crop in crops) else 2
    rows = [_panels(crop)[:columns] for crop in crops]
    heights = [max(image.height for image, _ in row) for row in rows]
    width = columns * (SIDE + GAP) + GAP
    height = TITLE_HEIGHT + sum(heights) + len(rows) * (CAPTION_HEIGHT + GAP)
    with new_figure(figsize=(width / DPI, height / DPI), dpi=DPI) as figure:
        title = f"Largest errors of {label(crops[0].model.codec)}: {label(images)}"
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
    """The images of one row and their captions."""
    window, measured = crop.window, crop.model.measured
    place = f"{window.width}×{window.height} of {measured.width}×{measured.height}, at ({window.left}, {window.top})"
    panels = [(_shown(crop.original), f"{label(measured.name)}\n{place}")]
    for panel in (crop.model, crop.nearest):
        if panel:
            estimated = " (estimated)" if isinstance(panel.measured, Estimated) else ""
            rate = f"{panel.measured.bpp:.3f} bpp{estimated}"
            if panel.measured.psnr is not None:
                rate += f", {panel.measured.psnr:.2f} dB"
            panels.append((_shown(panel.pixels), f"{label(panel.codec)}\n{rate}"))
    return panels


def _shown(pixels: Tensor) -> Image.Image:
    """A crop, uint8 (3, H, W), with magnified pixels."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    times = SIDE // max(image.size)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
