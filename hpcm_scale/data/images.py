"""From the bytes of an image file to 8-bit RGB, by one stated rule for every kind of image."""

from __future__ import annotations

import warnings
from contextlib import suppress
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP")
EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels: white."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image to 8-bit RGB, upright. `image` is loaded and may be turned in place.

    The rule: the EXIF rotation is applied (a malformed EXIF block counts as none); of 16-bit samples
    the high byte is kept; transparent images are laid over `BACKGROUND`; grey, palette and CMYK become
    RGB by Pillow's formulas; ICC profiles are ignored; of an animation the first frame is taken.
    """
    image.load()
    with suppress(Exception):  # Pillow raises nearly anything on malformed EXIF; the pixels are sound
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow itself keeps the high byte of 16-bit colour
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        background = Image.new("RGBA", layer.size, (*BACKGROUND, 255))
        return Image.alpha_composite(background, layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(data: bytes) -> Image.Image:
    """Decode a JPEG, PNG or WebP file wholly to 8-bit RGB by the rule of `to_rgb`.

    Raises `ValueError`, with the reason as its text, for anything that is no such file, is truncated
    or broken, or unfolds to more pixels than Pillow's limit of about 179 million.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata and large images: neither is an error
            return to_rgb(Image.open(BytesIO(data), formats=FORMATS))
    except Image.UnidentifiedImageError:
        raise ValueError("not a JPEG, PNG or WebP image") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"too many pixels: {error}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise nearly anything on broken files
        raise ValueError(f"broken image: {error}") from error


def extension_of(data: bytes) -> str:
    """The usual extension of a file that `decode` takes, by its first bytes."""
    return {b"\x89P": "png", b"RI": "webp"}.get(data[:2], "jpg")


def to_array(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image as a contiguous, writable uint8 array (3, H, W)."""
    return np.asarray(image).transpose(2, 0, 1).copy()
