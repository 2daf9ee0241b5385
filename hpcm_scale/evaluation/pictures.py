"""A picture of reconstructions beside their originals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from hpcm_scale.evaluation.estimate import Reconstruction
from hpcm_scale.files import whole_file

# All in pixels of the picture, so that images up to the largest size are shown as they are, pixel by pixel.
LARGEST = (768, 576)
SMALLEST = 256
"""Images with a longer side below this are magnified by a whole number."""
CAPTION_WIDTH = 400
CAPTION_HEIGHT = 28
TITLE_HEIGHT = 52
GAP = 12
DPI = 100


def draw_reconstructions(reconstructions: Sequence[Reconstruction], path: str | Path, title: str) -> None:
    """One row per image: the original, then the reconstruction, its bits per pixel and PSNR written above.

    `path` ends in .png, .jpg, .webp or another suffix of a picture.
    """
    rows = [(_shown(r.original), _shown(r.reconstruction), r.result) for r in reconstructions]
    cells = [max(original.width, CAPTION_WIDTH) for original, _, _ in rows]
    width = 2 * max(cells) + 3 * GAP
    height = TITLE_HEIGHT + sum(original.height + CAPTION_HEIGHT + GAP for original, _, _ in rows)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.text(0.5, 1 - TITLE_HEIGHT / 2 / height, title, fontsize=13, fontweight="bold", ha="center", va="center")
    bottom = height - TITLE_HEIGHT
    for (original, reconstruction, result), cell in zip(rows, cells, strict=True):
        bottom -= CAPTION_HEIGHT + original.height
        captions = (
            f"{_shortened(result.name)}, {result.width}×{result.height}",
            f"{result.bpp:.3f} bpp (estimated), {result.psnr:.2f} dB PSNR",
        )
        for side, image, caption in zip((-1, 1), (original, reconstruction), captions, strict=True):
            middle = width / 2 + side * (GAP + cell) / 2
            left = round(middle - image.width / 2)
            axes = figure.add_axes((left / width, bottom / height, image.width / width, image.height / height))
            axes.imshow(image, aspect="auto", interpolation="none")
            axes.set_axis_off()
            caption_height = (bottom + image.height + CAPTION_HEIGHT * 0.4) / height
            figure.text(middle / width, caption_height, caption, fontsize=11, ha="center", va="center")
        bottom -= GAP
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format=Path(path).suffix.lstrip(".") or "png")


def _shown(pixels: Tensor) -> Image.Image:
    """An image, uint8 (3, H, W), at the size it is shown."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    magnified = max(1, SMALLEST // max(image.size))
    scale = min(LARGEST[0] / image.width, LARGEST[1] / image.height, magnified)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)


def _shortened(name: str, most: int = 34) -> str:
    """The name, or its end where it is too long for its place."""
    return name if len(name) <= most else "…" + name[1 - most :]
