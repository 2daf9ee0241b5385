"""Images for checks and tests that need no particular ones: drawn from a seed, the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw


def drawn_image(seed: int, height: int, width: int) -> np.ndarray:
    """Soft gradients, shapes with hard edges, texture of every scale and grain; uint8 (height, width, 3)."""
    random = np.random.default_rng(seed)

    def colours(*shape: int) -> np.ndarray:
        muted = random.integers(30, 226, (*shape, 1)) + random.integers(-40, 41, (*shape, 3))
        return muted.clip(0, 255).astype(np.uint8)

    image = Image.fromarray(colours(4, 6)).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for shape in 6 * (draw.ellipse, draw.rectangle):
        left, top = random.integers(0, (width, height))
        right, bottom = left + random.integers(0, width // 4 + 1), top + random.integers(0, height // 4 + 1)
        shape((left, top, right, bottom), fill=tuple(colours().tolist()))
    pixels = np.asarray(image, dtype=np.float32)
    for cells in (8, 16, 32, 64, 128, 256):
        texture = Image.fromarray(random.normal(0, 60 / cells**0.5, (cells, cells)).astype(np.float32))
        pixels = pixels + np.asarray(texture.resize((width, height), Image.Resampling.BICUBIC))[..., None]
    return (pixels + random.normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8)


def write_images(folder: Path, sizes: Mapping[str, tuple[int, int]], **options: Any) -> list[Path]:
    """Draw an image of each (height, width) into a folder, which is created.

    The names tell the formats; `options` go to Pillow's `save`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in sizes]
    for seed, (path, size) in enumerate(zip(paths, sizes.values(), strict=True)):
        Image.fromarray(drawn_image(seed, *size)).save(path, **options)
    return paths
