"""JPEG, WebP, AVIF, JPEG XL, HEVC and VVC as baselines."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Mapping
from io import BytesIO
from typing import ClassVar

import numpy as np
import PIL
from PIL import Image, features

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.baselines.base import OtherCodec, from_ycbcr, optional_library, to_ycbcr

# JPEG, WebP and AVIF, through Pillow.


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


# JPEG XL, through imagecodecs.


class JPEGXL(OtherCodec):
    """JPEG XL (VarDCT in its XYB colours, 4:4:4) at the library's usual effort; it is tuned for looks, not for PSNR."""

    name = "jxl"
    settings = (25, 16, 10, 6, 4, 2.5, 1.5, 0.9)
    knob = "distance"

    def __init__(self) -> None:
        self._library = optional_library("imagecodecs", self.name)
        if not self._library.JPEGXL.available:
            raise UserError("this imagecodecs was built without JPEG XL; install a build that has it, or leave jxl out")
        version = self._library.jpegxl_version()  # "libjxl 0.11.2"
        self.description = f"imagecodecs {self._library.__version__}, {version}; effort 7, XYB 4:4:4"

    def encode(self, image: np.ndarray, setting: float) -> bytes:
        """The file of an image, uint8 (H, W, 3); the setting is Butteraugli's distance, 1 being hard to see."""
        return bytes(self._library.jpegxl_encode(image, distance=float(setting), effort=7))

    def decode(self, data: bytes, height: int, width: int) -> np.ndarray:
        """The image in a file, uint8 (height, width, 3)."""
        return self._library.jpegxl_decode(data)


# HEVC still pictures in HEIF files, by x265, through pillow-heif.


PARAMETERS = {
    "chroma": "444",
    "preset": "slower",
    "tune": "psnr",
    # The tuning leaves these on, and they cost up to 0.5 dB: bits spent on what looks like texture.
    "x265:psy-rd": "0",
    "x265:psy-rdoq": "0",
    # Rows that can be coded at once cost bits, and x265 makes them only where it has several processors.
    "x265:wpp": "0",
}
LARGEST = 1023
"""Of 10 bits: coded so, the way to YCbCr and back rounds less than with 8 (0.15 dB at 1 bpp)."""


class HEVC(OtherCodec):
    """HEVC intra at a constant quantizer, 10 bit, 4:4:4, full-range BT.601; tuned for PSNR."""

    name = "hevc"
    settings = (45, 41, 37, 33, 29, 25, 21)
    knob = "QP"

    def __init__(self) -> None:
        self._library = optional_library("pillow_heif", self.name)
        encoder = self._library.libheif_info()["encoders"].get("x265")
        if not encoder:
            raise UserError("this pillow-heif was built without x265; install a build that has it, or leave hevc out")
        version = encoder.removeprefix("x265 HEVC encoder (").rstrip(")")
        self.description = (
            f"pillow-heif {self._library.__version__}, libheif {self._library.libheif_version()}, x265 {version}; "
            "preset slower, constant QP, tuned for PSNR, 10 bit, BT.601 full range, 4:4:4"
        )

    def encode(self, image: np.ndarray, setting: float) -> bytes:
        """The file of an image, uint8 (H, W, 3)."""
        height, width = image.shape[:2]
        samples = np.rint(image * (LARGEST / 255)).astype("<u2") << 6  # the library drops the low 6 of 16 bits
        picture = self._library.from_bytes("RGB;16", (width, height), samples.tobytes())
        file = BytesIO()
        picture.save(
            file,
            enc_params={**PARAMETERS, "x265:qp": f"{setting:g}"},
            matrix_coefficients=6,
            full_range_flag=1,
        )
        return file.getvalue()

    def decode(self, data: bytes, height: int, width: int) -> np.ndarray:
        """The image in a file, uint8 (height, width, 3)."""
        picture = self._library.open_heif(BytesIO(data), convert_hdr_to_8bit=False)
        return np.rint((np.asarray(picture) >> 6) * (255 / LARGEST)).astype(np.uint8)


# VVC still pictures by VVenC, through the ffmpeg that imageio-ffmpeg brings along.


SMALLEST_SIDE = 32
"""Pixels: VVenC fails on less."""
START_SECONDS = 60
SECONDS_PER_MEGAPIXEL = 600
"""Beside the start, twenty times what an image takes: a program that needs longer hangs."""
RAW = ("-f", "rawvideo", "-pix_fmt", "yuv420p10le")
ENCODER = ("-c:v", "libvvenc", "-preset", "medium", "-qpa", "0", "-threads", "1")
MEND = 'pip install --force-reinstall "hpcm-scale[codecs]", or leave vvc out'


class VVC(OtherCodec):
    """VVC intra, 10 bit, 4:2:0 (VVenC has nothing else), in one thread: their number changes the bitstream.

    The colours are changed here: ffmpeg's own filters lost up to 1 dB. An image is padded by replication to even
    sides of at least 32 pixels, and cropped again; its padding costs bits.
    """

    name = "vvc"
    settings = (47, 42, 37, 32, 27, 22)
    knob = "QP"

    def __init__(self) -> None:
        library = optional_library("imageio_ffmpeg", self.name)
        grey = np.full((SMALLEST_SIDE, SMALLEST_SIDE, 3), 128, np.uint8)
        try:
            self._program = library.get_ffmpeg_exe()
            log = self._run("-loglevel", "verbose", *_encoding(grey, 32), data=to_ycbcr(grey)).stderr.decode()
            self.decode(self.encode(grey, 32), SMALLEST_SIDE, SMALLEST_SIDE)
        except (OSError, RuntimeError) as error:
            raise UserError(f"vvc needs an ffmpeg with libvvenc and a decoder of VVC ({error}); {MEND}") from error
        version = re.search(r"libvvenc version: (\S+)", log)
        self.description = (
            f"imageio-ffmpeg {library.__version__}, ffmpeg {library.get_ffmpeg_version()}, "
            f"VVenC{f' {version[1]}' if version else ''}; preset medium, qpa 0, 10 bit, BT.601 full range, 4:2:0"
        )

    def encode(self, image: np.ndarray, setting: float) -> bytes:
        """The bitstream of an image, uint8 (H, W, 3)."""
        height, width = image.shape[:2]
        beside = ((0, _padded(height) - height), (0, _padded(width) - width), (0, 0))
        image = np.pad(image, beside, mode="edge")
        return self._run(*_encoding(image, setting), data=to_ycbcr(image), pixels=height * width).stdout

    def decode(self, data: bytes, height: int, width: int) -> np.ndarray:
        """The image in a bitstream, uint8 (height, width, 3)."""
        rows, columns = _padded(height), _padded(width)
        samples = self._run("-f", "vvc", "-i", "-", *RAW, "-", data=data, pixels=height * width).stdout
        if len(samples) != 3 * rows * columns:  # 2 bytes for each of 1.5 samples a pixel
            raise RuntimeError(f"ffmpeg decoded {len(samples)} bytes where {3 * rows * columns} belong")
        return from_ycbcr(samples, rows, columns)[:height, :width]

    def _run(self, *arguments: str, data: bytes, pixels: int = 0) -> subprocess.CompletedProcess[bytes]:
        """Run ffmpeg on `data`; raises `RuntimeError` if it fails, or hangs for an image of so many pixels."""
        command = (self._program, "-hide_banner", "-nostdin", "-loglevel", "error", *arguments)
        limit = START_SECONDS + SECONDS_PER_MEGAPIXEL * pixels / 1e6
        try:
            done = subprocess.run(command, input=data, capture_output=True, timeout=limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"ffmpeg was stopped after {limit:.0f} seconds") from None
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"ffmpeg failed with {done.returncode}: {said[0] if said else 'it said nothing'}")
        return done


def _encoding(image: np.ndarray, setting: float) -> tuple[str, ...]:
    """ffmpeg's arguments for raw samples in, bitstream out."""
    height, width = image.shape[:2]
    return (*RAW, "-s", f"{width}x{height}", "-i", "-", *ENCODER, "-qp", f"{setting:g}", "-f", "vvc", "-")


def _padded(side: int) -> int:
    return max(SMALLEST_SIDE, side + side % 2)
