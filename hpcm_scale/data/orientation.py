"""How an image is stored on its side or mirrored, as its EXIF block tells."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import NamedTuple

from PIL import Image
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


TAG = 0x0112
"""Of the orientation in an EXIF block."""
FORMATS = {1: "B", 3: "H", 4: "I"}
"""Of whole numbers, by the type in an EXIF block."""


def orientation_of(exif: bytes) -> Orientation:
    """What an EXIF block says, in its first directory; an empty or malformed one says nothing.

    Nothing else turns an image: no XMP packet, and no EXIF of a thumbnail.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    with suppress(struct.error):
        if order:
            (directory,) = struct.unpack_from(f"{order}I", exif, 4)
            (entries,) = struct.unpack_from(f"{order}H", exif, directory)
            for at in range(directory + 2, directory + 2 + 12 * entries, 12):
                tag, kind = struct.unpack_from(f"{order}HH", exif, at)
                if tag == TAG and kind in FORMATS:
                    (number,) = struct.unpack_from(order + FORMATS[kind], exif, at + 8)
                    return ORIENTATIONS.get(number, AS_STORED)
    return AS_STORED
