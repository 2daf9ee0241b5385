"""Decoding of JPEG, PNG and WebP files to 8-bit RGB, by one rule (docs/images.md), and training crops."""

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

from hpcm_scale.data import jpeg, png
from hpcm_scale.data.mixture import AUGMENTATION, random_words

# EXIF orientation.

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, pixels; the last two are exclusive."""


class Orientation(NamedTuple):
    """How an image is stored: axes swapped, then mirrored; `method` makes it upright."""

    method: Transpose | None = None
    swapped: bool = False
    mirrored_x: bool = False
    mirrored_y: bool = False

    def upright(self, image: Image.Image) -> Image.Image:
        """The upright image."""
        return image if self.method is None else image.transpose(self.method)

    def size(self, stored: tuple[int, int]) -> tuple[int, int]:
        """Width and height of the upright image, from those of the stored one."""
        return (stored[1], stored[0]) if self.swapped else stored

    def stored(self, box: Box, size: tuple[int, int]) -> Box:
        """The box of the stored image, of `size`, that becomes `box` of the upright one."""
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
"""EXIF tag of the orientation."""
_EXIF_FORMATS = {1: "B", 3: "H", 4: "I"}
"""Struct formats of EXIF's integer types."""


def orientation_of(exif: bytes) -> Orientation:
    """The orientation in the first directory of an EXIF block; `AS_STORED` if the block is empty or malformed.

    XMP packets and the EXIF block of a thumbnail are ignored.
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
"""Types of the chunks that determine the pixels."""


def read_webp(data: bytes) -> tuple[bytes, bytes]:
    """A WebP file without the chunks that do not determine the pixels, and its EXIF block or b""."""
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
"""Largest image, above the 151 million of the largest cameras; checked in the header, before decoding."""
Colour = tuple[int, int, int]
BACKGROUND: Colour = (255, 255, 255)
"""Colour behind transparent pixels: white."""


class TransparentImage(ValueError):
    """The image has transparent pixels, and no background was given."""


def to_rgb(
    image: Image.Image, background: Colour | None = BACKGROUND, orientation: Orientation = AS_STORED
) -> Image.Image:
    """Convert an image, stored in some `orientation`, to upright 8-bit RGB.

    The rule (docs/images.md): the EXIF orientation is applied, a malformed EXIF block and XMP are ignored; 16-bit
    samples keep their high byte; transparent images are composited over `background`; grey, palette and CMYK become RGB
    by Pillow's formulas; ICC profiles are ignored, pixels count as sRGB; of an animation the first frame is used.
    Without a background, an image with a pixel that is not opaque raises `TransparentImage`.
    """
    image = orientation.upright(image)
    if image.mode.startswith("I"):
        image = png.high_byte(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        if background is None and any(layer.getchannel("A").histogram()[:255]):
            raise TransparentImage("it has transparent pixels")
        behind = Image.new("RGBA", layer.size, (*(background or BACKGROUND), 255))
        return Image.alpha_composite(behind, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


class EncodedImage:
    """A JPEG, PNG or WebP file in memory; only its header is decoded.

    Unused metadata is removed first, so that damage to it does not matter. All methods raise `ValueError`, with the
    reason as text, for other files, for files that are truncated or broken in the decoded part or have more than
    `MAX_PIXELS`, and as `to_rgb`.
    """

    orientation: Orientation
    """Orientation by its EXIF block."""
    is_jpeg: bool
    """Whether its first bytes are those of a JPEG."""

    def __init__(self, data: bytes) -> None:
        self._png: png.Png | None = None
        self._jpeg: jpeg.Jpeg | None = None
        exif = b""
        with reasons():
            kind = extension_of(data)
            if kind == "png":
                self._png = png.read_png(data)
                data, exif = self._png.file, self._png.exif
            elif kind == "jpg":
                self._jpeg = jpeg.read_jpeg(data)
                data, exif = self._jpeg.file, self._jpeg.exif
            elif kind == "webp":
                data, exif = read_webp(data)
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
        """The whole image as 8-bit RGB, by the rule of `to_rgb`.

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
        """Equal to `decode().crop(box)`; of a JPEG, rows below the box are not decoded."""
        stored = self.orientation.stored(box, self._image.size)
        with reasons():
            return to_rgb(self._rows(stored[3]).crop(stored), orientation=self.orientation)

    def _stored(self) -> Image.Image:
        """The whole image as stored."""
        self._image.load()
        return png.with_alpha(self._image, self._png) if self._png else self._image

    def _rows(self, needed: int) -> Image.Image:
        """The image as stored, or only its upper part with the needed rows."""
        if self._jpeg:
            fewer = jpeg.shortened(self._jpeg.file, needed)
            if fewer is not self._jpeg.file:
                with suppress(Exception):  # some unusual files decode only as a whole
                    part = _open(fewer)
                    part.load()
                    return part
        return self._stored()


def _open(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data), formats=FORMATS)


def decode(data: bytes, background: Colour | None = BACKGROUND) -> Image.Image:
    """Decode a JPEG, PNG or WebP file to 8-bit RGB by the rule of `to_rgb`; raises as `EncodedImage`."""
    return EncodedImage(data).decode(background)


@contextmanager
def reasons() -> Iterator[None]:
    """Convert what Pillow raises on broken files to a `ValueError` with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unusual metadata and large images are no errors
            yield
    except Image.UnidentifiedImageError:
        raise ValueError("not a JPEG, PNG or WebP image") from None
    except Image.DecompressionBombError:
        # Pillow's limit is twice this number, or none; it matters if a program has lowered it.
        limit = min(MAX_PIXELS, 2 * (Image.MAX_IMAGE_PIXELS or MAX_PIXELS))
        raise ValueError(f"too many pixels: more than {limit:,}") from None
    except (MemoryError, TransparentImage):
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(f"broken image: {error}") from error


def extension_of(data: bytes) -> str | None:
    """The usual extension of a JPEG, PNG or WebP file, by its first 12 bytes; None for other files."""
    if data.startswith(jpeg.START):
        return "jpg"
    if data.startswith(png.SIGNATURE):
        return "png"
    return "webp" if (data[:4], data[8:12]) == (b"RIFF", b"WEBP") else None


def to_array(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image as a contiguous, writable uint8 array (3, H, W)."""
    return np.asarray(image).transpose(2, 0, 1).copy()


# Training crops: square, seeded per image, independent of the data worker.

LANCZOS_SUPPORT = 3
"""Pixels of the scaled image on either side of a pixel that Pillow's Lanczos filter reads."""


class Place(NamedTuple):
    """The position of a crop in an image."""

    box: Box
    side: int
    """Of the box, pixels."""
    mirrored: bool


def place(
    size: tuple[int, int], crop: int, flip: bool, *, seed: int, epoch: int, sample: int, downscale: float = 1.0
) -> Place:
    """A random square in an image of `size` (width, height) for a crop of side `crop` pixels, mirrored half of the
    time if `flip`. A pure function of its arguments.

    Its side is crop / factor, rounded, with a factor drawn uniformly from [`downscale`, 1], or from the part of this
    interval that leaves the smaller side at least `crop` pixels. In an image with a side shorter than the crop it is
    the largest square that fits.

    Downscaling by a random factor reduces JPEG artefacts (Ballé et al., "Variational image compression with a scale
    hyperprior", 2018: to a smaller side of 640 to 1200 pixels, from 3000 to 5000).
    """
    width, height = size
    words = [int(word) for word in random_words(seed, epoch, AUGMENTATION, sample, 4)]
    least = min(max(downscale, crop / min(size)), 1.0)
    factor = least + (1 - least) * (words[3] / 2**64)
    side = min(round(crop / factor), width, height)
    left, top = words[0] % (width - side + 1), words[1] % (height - side + 1)
    return Place((left, top, left + side, top + side), side, flip and words[2] % 2 == 1)


def cut(
    image: EncodedImage, crop: int, flip: bool, *, seed: int, epoch: int, sample: int, downscale: float = 1.0
) -> tuple[Image.Image, bool]:
    """Cut the square at `place` and scale it (Lanczos) to side `crop` pixels; returns it and whether it was scaled up.

    The image is decoded only as far as needed. Raises `ValueError` as `EncodedImage`.
    """
    box, side, mirrored = place(image.size, crop, flip, seed=seed, epoch=epoch, sample=sample, downscale=downscale)
    if side < crop:  # Lanczos reads beyond the box
        square = image.decode().resize((crop, crop), Image.Resampling.LANCZOS, box=box)
    elif side == crop:
        square = image.decode_box(box)
    else:
        around = _around(box, -(-LANCZOS_SUPPORT * side // crop), image.size)
        left, top = box[0] - around[0], box[1] - around[1]
        inside = (left, top, left + side, top + side)
        square = image.decode_box(around).resize((crop, crop), Image.Resampling.LANCZOS, box=inside)
    return (ImageOps.mirror(square) if mirrored else square), side < crop


def _around(box: Box, margin: int, size: tuple[int, int]) -> Box:
    """A box enlarged by `margin` pixels on each side, within the image."""
    left, top, right, bottom = box
    return max(left - margin, 0), max(top - margin, 0), min(right + margin, size[0]), min(bottom + margin, size[1])
