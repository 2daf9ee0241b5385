"""How an image is stored on its side or mirrored, as its EXIF block tells."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

from PIL import ExifTags, Image
from PIL.Image import Transpose

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, pixels; the last two lie outside."""


class Orientation(NamedTuple):
    """What makes a stored image upright, and how it was stored: axes swapped, and then mirrored."""

    method: Transpose | None = None
    swapped: bool = False
    mirrored_x: bool = False
    mirrored_y: bool = False

    def upright(self, image: Image.Image) -> Image.Image:
        return image if self.method is None else image.transpose(self.method)

    def size(self, stored: tuple[int, int]) -> tuple[int, int]:
        """Width and height of the upright image, of those of the stored one."""
        return stored[::-1] if self.swapped else stored

    def stored(self, box: Box, size: tuple[int, int]) -> Box:
        """Where a box of the upright image lies in the stored one, which is of `size`."""
        (left, top, right, bottom), (width, height) = box, size
        if self.swapped:
            left, top, right, bottom = top, left, bottom, right
        if self.mirrored_x:
            left, right = width - right, width - left
        if self.mirrored_y:
            top, bottom = height - bottom, height - top
        return left, top, right, bottom


AS_STORED = Orientation()
ORIENTATIONS = {
    2: Orientation(Transpose.FLIP_LEFT_RIGHT, mirrored_x=True),
    3: Orientation(Transpose.ROTATE_180, mirrored_x=True, mirrored_y=True),
    4: Orientation(Transpose.FLIP_TOP_BOTTOM, mirrored_y=True),
    5: Orientation(Transpose.TRANSPOSE, swapped=True),
    6: Orientation(Transpose.ROTATE_270, swapped=True, mirrored_y=True),
    7: Orientation(Transpose.TRANSVERSE, swapped=True, mirrored_x=True, mirrored_y=True),
    8: Orientation(Transpose.ROTATE_90, swapped=True, mirrored_x=True),
}
"""By the number in the EXIF block."""


def orientation_of(image: Image.Image) -> Orientation:
    """What the EXIF block of an image says; a malformed one counts as none."""
    with suppress(Exception):  # Pillow raises nearly anything on malformed EXIF; the pixels are sound
        return ORIENTATIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1), AS_STORED)
    return AS_STORED
