"""From the bytes of an image file to 8-bit RGB, by one stated rule for every kind of image."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.Image import Transpose

from hpcm_scale.data import images, jpeg, png
from hpcm_scale.data.mixture import AUGMENTATION, random_words

# How an image is stored on its side or mirrored, as its EXIF block tells.


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
_EXIF_FORMATS = {1: "B", 3: "H", 4: "I"}
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
                if tag == TAG and kind in _EXIF_FORMATS:
                    (number,) = struct.unpack_from(order + _EXIF_FORMATS[kind], exif, at + 8)
                    return ORIENTATIONS.get(number, AS_STORED)
    return AS_STORED


# WebP files without metadata.


USED = frozenset({b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L"})
"""Types of the chunks that decide about the pixels."""


def is_webp(data: bytes) -> bool:
    """By its first bytes."""
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def read_webp(data: bytes) -> tuple[bytes, bytes]:
    """The same WebP with the chunks that decide about the pixels alone, and its EXIF block, if there is one."""
    whole = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    at, kept, exif = 12, [], b""
    while at + 8 <= whole:
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        content = at + 8
        at = content + length + length % 2
        if kind in USED:
            kept.append(data[content - 8 : at])
        elif kind == b"EXIF":
            exif = exif or data[content : content + length]
    body = b"".join((b"WEBP", *kept))
    return b"".join((b"RIFF", len(body).to_bytes(4, "little"), body)), exif


FORMATS = ("JPEG", "PNG", "WEBP")
EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
MAX_PIXELS = 170_000_000
"""Of one image: photos of the largest cameras have 151 million. More is refused by the header, before it unfolds."""
Colour = tuple[int, int, int]
BACKGROUND: Colour = (255, 255, 255)
"""What shows through transparent pixels: white."""


class TransparentImage(ValueError):
    """There is no background to lay a transparent image over."""


def to_rgb(
    image: Image.Image, background: Colour | None = BACKGROUND, orientation: Orientation = AS_STORED
) -> Image.Image:
    """Convert any image, stored in some `orientation`, to 8-bit RGB, upright.

    The rule, which `docs/images.md` describes: the EXIF orientation is applied (a malformed EXIF block counts as none,
    and XMP never turns an image); of 16-bit samples the high byte is kept; transparent images are laid over
    `background`; grey, palette and CMYK become RGB by Pillow's formulas; ICC profiles are ignored, pixels count as
    sRGB; of an animation the first frame is taken.
    Without a background, an image with a pixel that is not opaque raises `TransparentImage`.
    """
    image = orientation.upright(image)
    if image.mode.startswith("I"):
        image = png.high_byte(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if background is None and layer.getextrema()[3][0] < 255:
            raise TransparentImage("it has transparent pixels")
        behind = Image.new("RGBA", layer.size, (*(background or BACKGROUND), 255))
        return Image.alpha_composite(behind, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


class EncodedImage:
    """A JPEG, PNG or WebP file in memory, of which the header has been read.

    Metadata that is not used is left out first, so that it refuses no image. Everything raises `ValueError`, with the
    reason as its text, for anything that is no such file, is truncated or broken as far as it is decoded, or has more
    than `MAX_PIXELS`; and where `to_rgb` does.
    """

    orientation: Orientation
    """How it is stored, by its EXIF block."""
    is_jpeg: bool
    """By its first bytes."""

    def __init__(self, data: bytes) -> None:
        self._png: png.Png | None = None
        self._jpeg: jpeg.Jpeg | None = None
        exif = b""
        with reasons():
            if data.startswith(png.SIGNATURE):
                self._png = png.read_png(data)
                data, exif = self._png.file, self._png.exif
            elif data.startswith(jpeg.START):
                self._jpeg = jpeg.read_jpeg(data)
                data, exif = self._jpeg.file, self._jpeg.exif
            elif images.is_webp(data):
                data, exif = images.read_webp(data)
            self._image = _open(data)
            if self._image.width * self._image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
        self.is_jpeg = self._jpeg is not None
        self.orientation = orientation_of(exif)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, upright, pixels."""
        return self.orientation.size(self._image.size)

    def decode(self, background: Colour | None = BACKGROUND) -> Image.Image:
        """All of it as 8-bit RGB, by the rule of `to_rgb`.

        A JPEG with an end marker before the end of its coded data is broken; whole scans may be missing.
        """
        with reasons():
            image = self._stored()
            if self._jpeg and self._jpeg.scans and _open(jpeg.disturbed(self._jpeg.file)).tobytes() != image.tobytes():
                raise ValueError("image file is truncated")
            if self._png and png.lacks_pixels(self._png.file):
                raise ValueError("image file is truncated")
            return to_rgb(image, background, self.orientation)

    def decode_box(self, box: Box) -> Image.Image:
        """The same as `decode().crop(box)`, without what lies below the box in the file, if it is a JPEG."""
        stored = self.orientation.stored(box, self._image.size)
        with reasons():
            return to_rgb(self._rows(stored[3]).crop(stored), orientation=self.orientation)

    def _stored(self) -> Image.Image:
        """All of the image as stored."""
        self._image.load()
        has_colour = self._png is not None and self._png.colour is not None
        return png.with_alpha(self._image, self._png) if has_colour else self._image

    def _rows(self, needed: int) -> Image.Image:
        """The image as stored, or only its upper part with the rows that are needed."""
        if self._jpeg:
            fewer = jpeg.shortened(self._jpeg.file, needed)
            if fewer is not self._jpeg.file:
                with suppress(Exception):  # an odd file may decode only wholly
                    part = _open(fewer)
                    part.load()
                    return part
        return self._stored()


def _open(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data), formats=FORMATS)


def decode(data: bytes, background: Colour | None = BACKGROUND) -> Image.Image:
    """Decode a JPEG, PNG or WebP file wholly to 8-bit RGB by the rule of `to_rgb`; raises as `EncodedImage` does."""
    return EncodedImage(data).decode(background)


@contextmanager
def reasons() -> Iterator[None]:
    """What Pillow raises on files that are no image, or a broken one, becomes a `ValueError` with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata and large images: neither is an error
            yield
    except Image.UnidentifiedImageError:
        raise ValueError("not a JPEG, PNG or WebP image") from None
    except Image.DecompressionBombError:
        # Pillow's own limit is twice this number, or none; it matters where a program has lowered it.
        limit = min(MAX_PIXELS, 2 * (Image.MAX_IMAGE_PIXELS or MAX_PIXELS))
        raise ValueError(f"too many pixels: more than {limit:,}") from None
    except (MemoryError, TransparentImage):
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on broken files
        raise ValueError(f"broken image: {error}") from error


def extension_of(data: bytes) -> str:
    """The usual extension of a file that `decode` takes, by its first bytes."""
    return {b"\x89P": "png", b"RI": "webp"}.get(data[:2], "jpg")


def to_array(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image as a contiguous, writable uint8 array (3, H, W)."""
    return np.asarray(image).transpose(2, 0, 1).copy()


# Training crops: square, seeded per image, never by the worker that happens to cut them.


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
