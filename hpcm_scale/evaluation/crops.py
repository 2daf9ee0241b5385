"""visual.png: the crops with the largest error of a model, beside the originals and a baseline at the same rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hpcm_scale.evaluation.baselines import Baseline
from hpcm_scale.evaluation.bd_rate import labelled
from hpcm_scale.evaluation.measures import Estimated, Measured, measure
from hpcm_scale.evaluation.runners import CodedImage, Images
from hpcm_scale.formatting import label, new_figure, save

CROP = 256
"""Side of a crop in pixels; smaller images are shown whole."""
STRIDE = 32
"""Positions of crops are multiples of this many pixels."""
RULE = (
    "The crop with the largest squared error of each image, for the images where it is largest.\n"
    "Rates and PSNR are of the whole image."
)
SAME_RATE = " Right: the baseline codec at the nearest rate that it reaches."
STEPS = 12
"""Most files of a bisection."""

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
    baseline: Panel | None = None
    """A baseline at the rate of the model on this image."""


class Crops:
    """Chooses crops while images are coded by the model; a baseline codes the chosen images again.

    One crop per image, the `CROP`×`CROP` window with the largest squared error of the model, for the `number` images
    where it is largest; the first of equals.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._chosen: dict[int, Crop] = {}
        self._model: str | None = None

    def watch(self, codec: str, index: int, original: Tensor, decoded: Tensor, measured: Measured) -> None:
        """A `Watcher`; the model is the first codec that it is called with, and others are ignored."""
        self._model = self._model or codec
        if codec != self._model:
            return
        window, error = worst_window(original, decoded)
        self._chosen[index] = Crop(window, error, window.cut(original), Panel(codec, window.cut(decoded), measured))
        if len(self._chosen) > self.number:
            del self._chosen[min(self._chosen, key=lambda i: (self._chosen[i].error, -i))]

    def compare(self, codec: Baseline, images: Images) -> None:
        """Code the chosen images of the set with a baseline, each at the rate of the model (`code_to_size`)."""
        for index, crop in self._chosen.items():
            pixels = images.load(index)
            setting, coded = code_to_size(codec, pixels, crop.model.measured.bits)
            title = f"{labelled(codec.name, codec.description)} {codec.label(setting)}"
            measured = measure(images.names[index], pixels, coded.decoded, coded.bits, metrics=["psnr"])
            crop.baseline = Panel(title, crop.window.cut(coded.decoded), measured)

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


def code_to_size(codec: Baseline, pixels: Tensor, bits: float) -> tuple[float, CodedImage]:
    """The setting whose file of an image, uint8 (3, H, W), is nearest to a size by ratio, and its result.

    Found by bisection between the settings of the smallest and the largest files. Raises UserError as `codec.code`.
    """
    low, high = codec.settings[0] if codec.lowest is None else codec.lowest, codec.settings[-1]
    tried: dict[float, CodedImage] = {low: codec.code(pixels, low)}
    for _ in range(STEPS):
        setting = round((low + high) / 2) if codec.whole else (low + high) / 2
        if setting in tried:
            break
        tried[setting] = codec.code(pixels, setting)
        if tried[setting].bits < bits:
            low = setting
        else:
            high = setting
    return min(tried.items(), key=lambda item: abs(math.log(item[1].bits / bits)))


def draw_crops(crops: Sequence[Crop], path: str | Path, images: str) -> None:
    """Draw one row per crop: the original, the model and, if there is one, the baseline.

    `images`: title of the set; the suffix of `path` sets the format.
    """
    columns = 3 if any(crop.baseline for crop in crops) else 2
    rows = [_panels(crop)[:columns] for crop in crops]
    heights = [max(image.height for image, _ in row) for row in rows]
    width = columns * (SIDE + GAP) + GAP
    height = TITLE_HEIGHT + sum(heights) + len(rows) * (CAPTION_HEIGHT + GAP)
    with new_figure(figsize=(width / DPI, height / DPI), dpi=DPI) as figure:
        title = f"Largest errors of {label(crops[0].model.codec)}: {label(images)}"
        rule = RULE + (SAME_RATE if columns == 3 else "")
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
    for panel in (crop.model, crop.baseline):
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
