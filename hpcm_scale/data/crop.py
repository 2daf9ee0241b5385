"""Training crops: square, seeded per image, never by the worker that happens to cut them."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image, ImageOps

from hpcm_scale.data.images import EncodedImage
from hpcm_scale.data.order import AUGMENTATION, random_words
from hpcm_scale.data.orientation import Box


class Place(NamedTuple):
    """Where a crop lies in an image, and how."""

    box: Box
    side: int
    """Of the box, pixels."""
    mirrored: bool


def place(size: tuple[int, int], crop: int, flip: bool, *, seed: int, epoch: int, sample: int) -> Place:
    """A random square of side `crop` pixels in an image of `size` (width, height), mirrored half of the time if `flip`.

    Position and mirroring are a pure function of (seed, epoch, sample). Of an image with a side shorter
    than the crop, the largest square that fits is taken.
    """
    width, height = size
    side = min(crop, width, height)
    words = [int(word) for word in random_words(seed, epoch, AUGMENTATION, sample, 3)]
    left, top = words[0] % (width - side + 1), words[1] % (height - side + 1)
    return Place((left, top, left + side, top + side), side, flip and words[2] % 2 == 1)


def cut(
    image: Image.Image | EncodedImage, crop: int, flip: bool, *, seed: int, epoch: int, sample: int
) -> tuple[Image.Image, bool]:
    """The square that `place` says, scaled up (Lanczos) to side `crop` pixels if it is smaller.

    An encoded image is decoded no further than the square needs, and gives the same pixels as the decoded one.
    Raises `ValueError` as it does. Returns the crop and whether it was scaled up.
    """
    box, side, mirrored = place(image.size, crop, flip, seed=seed, epoch=epoch, sample=sample)
    if side < crop:  # Lanczos looks beyond the box
        whole = image.decode() if isinstance(image, EncodedImage) else image
        square = whole.resize((crop, crop), Image.Resampling.LANCZOS, box=box)
    else:
        square = image.decode_box(box) if isinstance(image, EncodedImage) else image.crop(box)
    return (ImageOps.mirror(square) if mirrored else square), side < crop
