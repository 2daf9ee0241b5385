"""From the bytes of an image file to 8-bit RGB, by one stated rule for every kind of image."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO

import numpy as np
from PIL import Image

from hpcm_scale.data import jpeg, png, webp
from hpcm_scale.data.orientation import AS_STORED, Box, Orientation, orientation_of

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
            elif webp.is_webp(data):
                data, exif = webp.read_webp(data)
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
