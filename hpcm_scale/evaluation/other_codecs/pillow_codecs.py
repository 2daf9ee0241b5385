"""JPEG, WebP and AVIF, through Pillow."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from io import BytesIO
from typing import ClassVar

import numpy as np
import PIL
from PIL import Image, features

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.other_codecs.base import OtherCodec


class PillowCodec(OtherCodec):
    """A format that Pillow writes; its setting is the format's quality."""

    format: ClassVar[str]
    fixed: ClassVar[Mapping[str, object]]
    """What is passed to `Image.save` beside the quality."""

    def encode(self, image: np.ndarray, setting: float) -> bytes:
        """The file of an image, uint8 (H, W, 3)."""
        file = BytesIO()
        Image.fromarray(image).save(file, self.format, quality=setting, **self.fixed)
        return file.getvalue()

    def decode(self, data: bytes, height: int, width: int) -> np.ndarray:
        """The image in a file, uint8 (height, width, 3)."""
        with Image.open(BytesIO(data), formats=[self.format]) as image:
            return np.array(image.convert("RGB"))


class JPEG(PillowCodec):
    """Baseline JPEG as the field plots it: 4:2:0, the library's usual tables for quantizing, optimised codes."""

    name = "jpeg"
    settings = (5, 10, 20, 35, 50, 70, 85, 92)
    format = "JPEG"
    fixed: ClassVar[Mapping[str, object]] = {"subsampling": "4:2:0", "optimize": True}

    def __init__(self) -> None:
        turbo = features.version("libjpeg_turbo")
        library = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
        self.description = f"{_pillow()}, {library}; baseline, optimised Huffman tables, 4:2:0"


class WebP(PillowCodec):
    """Lossy WebP, which is always 4:2:0, at its slowest method."""

    name = "webp"
    settings = (1, 5, 15, 30, 50, 70, 85, 93)
    format = "WEBP"
    fixed: ClassVar[Mapping[str, object]] = {"method": 6}

    def __init__(self) -> None:
        _require("webp", self.name)
        self.description = f"{_pillow()}, libwebp {features.version('webp')}; lossy, method 6, 4:2:0"


class AVIF(PillowCodec):
    """AVIF by aom; tuned for PSNR, for it is what is measured, where the library would tune for looks.

    One tile: Pillow would otherwise make the file depend on the number of processors.
    """

    name = "avif"
    settings = (10, 20, 30, 40, 50, 60, 70, 80)
    format = "AVIF"
    fixed: ClassVar[Mapping[str, object]] = {
        "codec": "aom",
        "speed": 4,
        "subsampling": "4:4:4",
        "autotiling": False,
        "advanced": {"tune": "psnr"},
    }

    def __init__(self) -> None:
        _require("avif", self.name)
        library = importlib.import_module("PIL._avif")  # tells what `features` does not
        if not library.encoder_codec_available("aom"):
            raise UserError(f"this Pillow cannot write AVIF with aom; {_mend(self.name)}")
        codecs = dict(part.rsplit(":", 1) for part in library.codec_versions().split(", "))
        versions = f"libavif {features.version('avif')}, aom {codecs['aom [enc]']}"
        self.description = f"{_pillow()}, {versions}; speed 4, tuned for PSNR, one tile, 8 bit, 4:4:4"


def _pillow() -> str:
    return f"Pillow {PIL.__version__}"


def _require(feature: str, codec: str) -> None:
    if not features.check(feature):
        raise UserError(f"this Pillow was built without {feature}; {_mend(codec)}")


def _mend(codec: str) -> str:
    return f"pip install --force-reinstall pillow for a build that has it, or leave {codec} out"
