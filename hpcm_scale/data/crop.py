"""Training crops: square, seeded per image, never by the worker that happens to cut them."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image, ImageOps

from hpcm_scale.data.images import EncodedImage
from hpcm_scale.data.order import AUGMENTATION, random_words
from hpcm_scale.data.orientation import Box

LANCZOS_REACH = 3
"""Pixels of the scaled image that Pillow's Lanczos looks at on either side of the centre of one."""


class Place(NamedTuple):
    """Where a crop lies in an image, and how."""

    box: Box
    side: int
    """Of the box, pixels."""
    mirrored: bool


def place(
    size: tuple[int, int], crop: int, flip: bool, *, seed: int, epoch: int, sample: int, downscale: float = 1.0
) -> Place:
    """A random square in an image of `size` (width, height) for a crop of side `crop` pixels, mirrored half of the
    time if `flip`.

    Its side is crop / factor, rounded, for the image is to be scaled down by a factor drawn uniformly from
    [`downscale`, 1], or from the part of it that leaves its smaller side at least `crop` pixels. Of an image with a
    side shorter than the crop, the largest square that fits is taken. All is a pure function of (seed, epoch, sample).

    Scaling down by a random factor takes off what JPEG has left in the photos (Ballé et al., "Variational image
    compression with a scale hyperprior", 2018: a smaller side of 640 to 1200 pixels, from 3000 to 5000).
    """
    width, height = size
    words = [int(word) for word in random_words(seed, epoch, AUGMENTATION, sample, 4)]
    least = min(max(downscale, crop / min(size)), 1.0)
    factor = least + (1 - least) * (words[3] / 2**64)
    side = min(round(crop / factor), width, height)
    left, top = words[0] % (width - side + 1), words[1] % (height - side + 1)
    return Place((left, top, left + side, top + side), side, flip and words[2] % 2 == 1)


def cut(
    image: Image.Image | EncodedImage,
    crop: int,
    flip: bool,
    *,
    seed: int,
    epoch: int,
    sample: int,
    downscale: float = 1.0,
) -> tuple[Image.Image, bool]:
    """The square that `place` says, scaled (Lanczos) to side `crop` pixels if it has another.

    An encoded image is decoded no further than the square needs, and gives the same pixels as the decoded one.
    Raises `ValueError` as it does. Returns the crop and whether it was scaled up.
    """
    box, side, mirrored = place(image.size, crop, flip, seed=seed, epoch=epoch, sample=sample, downscale=downscale)
    if side < crop:  # Lanczos looks beyond the box
        whole = image.decode() if isinstance(image, EncodedImage) else image
        square = whole.resize((crop, crop), Image.Resampling.LANCZOS, box=box)
    elif side == crop:
        square = _part(image, box)
    else:
        around = _around(box, -(-LANCZOS_REACH * side // crop), image.size)
        left, top = box[0] - around[0], box[1] - around[1]
        inside = (left, top, left + side, top + side)
        square = _part(image, around).resize((crop, crop), Image.Resampling.LANCZOS, box=inside)
    return (ImageOps.mirror(square) if mirrored else square), side < crop


def _part(image: Image.Image | EncodedImage, box: Box) -> Image.Image:
    return image.decode_box(box) if isinstance(image, EncodedImage) else image.crop(box)


def _around(box: Box, margin: int, size: tuple[int, int]) -> Box:
    """A box with `margin` pixels more on each side, as far as there are."""
    left, top, right, bottom = box
    return max(left - margin, 0), max(top - margin, 0), min(right + margin, size[0]), min(bottom + margin, size[1])
