"""Baseline codecs, through the libraries that people use: JPEG, WebP, AVIF, JPEG XL, HEVC and VVC."""

from __future__ import annotations

import importlib
import re
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from types import ModuleType
from typing import ClassVar

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, features
from torch import Tensor

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.runners import CodedImage

FAILURES = (OSError, RuntimeError, ValueError, Image.DecompressionBombError)
"""Errors of the libraries for an image that they cannot code."""


class Baseline(ABC):
    """A codec whose settings are fixed, except the one that sets the rate.

    The constructor raises UserError if a library or an encoder is missing.
    """

    name: ClassVar[str]
    settings: ClassVar[Sequence[float]]
    """By increasing rate: from 0.1 bpp or less to about 2 bpp on Kodak."""
    setting_name: ClassVar[str] = "quality"
    lowest: ClassVar[float | None] = None
    """The setting of the smallest files, if that is not the first of `settings`."""
    whole: ClassVar[bool] = True
    """Whether settings are whole numbers."""
    description: str
    """One line: library, versions, fixed settings, chroma format."""

    def label(self, setting: float) -> str:
        """A setting with its name: "quality 50", "QP 32"."""
        return f"{self.setting_name} {setting:.3g}"

    def code(self, pixels: Tensor, setting: float) -> CodedImage:
        """Encode `pixels`, uint8 (3, H, W), at a setting and decode the file.

        Raises UserError for an image that the codec cannot code, and for a program that fails or hangs.
        """
        height, width = pixels.shape[1:]
        image = np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())
        try:
            start = time.perf_counter()
            data = self.encode(image, setting)
            encoded = time.perf_counter()
            decoded = self.decode(data, height, width)
            done = time.perf_counter()
        except FAILURES as error:
            raise UserError(
                "baseline-fails",
                "--against",
                f"{self.name} cannot code an image of {width}×{height} pixels at {self.label(setting)} ({error}); "
                "omit the image or the codec",
            ) from error
        assert decoded.shape == image.shape and decoded.dtype == np.uint8
        planes = torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1)))
        return CodedImage(planes, 8.0 * len(data), encoded - start, done - encoded)

    @abstractmethod
    def encode(self, image: np.ndarray, setting: float) -> bytes:
        """The file of an image, uint8 (H, W, 3). Raises one of `FAILURES`."""

    @abstractmethod
    def decode(self, data: bytes, height: int, width: int) -> np.ndarray:
        """The image in a file, uint8 (height, width, 3). Raises one of `FAILURES`."""


def _library(module: str, codec: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            "no-baseline-library",
            "--against",
            f'{codec} needs the library {module} ({error}); run `pip install "hpcm-scale[codecs]"`, or omit {codec}',
        ) from error


def _encoder_missing(codec: str, library: str, encoder: str) -> UserError:
    return UserError(
        "no-baseline-encoder",
        "--against",
        f"this {library} has no {encoder}; run `pip install --force-reinstall {library.lower()}`, or omit {codec}",
    )


class PillowCodec(Baseline):
    """A format that Pillow writes; its setting is the format's quality."""

    format: ClassVar[str]
    options: ClassVar[Mapping[str, object]]
    """Of `Image.save`, besides the quality."""

    def encode(self, image: np.ndarray, setting: float, **options: object) -> bytes:
        """See `Baseline.encode`; `options` are further ones of `Image.save`."""
        file = BytesIO()
        Image.fromarray(image).save(file, self.format, quality=setting, **self.options, **options)
        return file.getvalue()

    def decode(self, data: bytes, height: int, width: int) -> np.ndarray:
        with Image.open(BytesIO(data), formats=[self.format]) as image:
            return np.array(image.convert("RGB"))


class JPEG(PillowCodec):
    """Baseline JPEG: 4:2:0, default quantization tables, optimised Huffman tables; also between whole qualities."""

    name = "jpeg"
    settings = (5, 10, 20, 35, 50, 70, 85, 92)
    lowest = 1
    whole = False
    format = "JPEG"
    options: ClassVar[Mapping[str, object]] = {"subsampling": "4:2:0", "optimize": True}

    def __init__(self) -> None:
        turbo = features.version("libjpeg_turbo")
        library = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version('jpg')}"
        self.description = f"Pillow {PIL.__version__}, {library}; baseline, optimised Huffman tables, 4:2:0"

    def encode(self, image: np.ndarray, setting: float) -> bytes:
        if setting == int(setting):
            return super().encode(image, int(setting))
        with Image.open(BytesIO(super().encode(image, 50))) as usual:
            scale = 50 / setting if setting < 50 else 2 - setting / 50
            tables = [
                [min(max(round(step * scale), 1), 255) for step in table] for table in usual.quantization.values()
            ]
        return super().encode(image, -1, qtables=tables)


class WebP(PillowCodec):
    """Lossy WebP, which is always 4:2:0, with its slowest method."""

    name = "webp"
    settings = (1, 5, 15, 30, 50, 70, 85, 93)
    format = "WEBP"
    options: ClassVar[Mapping[str, object]] = {"method": 6}

    def __init__(self) -> None:
        if not features.check("webp"):
            raise _encoder_missing(self.name, "Pillow", "WebP")
        self.description = f"Pillow {PIL.__version__}, libwebp {features.version('webp')}; lossy, method 6, 4:2:0"


class AVIF(PillowCodec):
    """AVIF by aom, tuned for PSNR (the default tunes for visual quality).

    One tile: otherwise the file depends on the number of processors.
    """

    name = "avif"
    settings = (10, 20, 30, 40, 50, 60, 70, 80)
    format = "AVIF"
    options: ClassVar[Mapping[str, object]] = {
        "codec": "aom",
        "speed": 4,
        "subsampling": "4:4:4",
        "autotiling": False,
        "advanced": {"tune": "psnr"},
    }

    def __init__(self) -> None:
        if not features.check("avif"):
            raise _encoder_missing(self.name, "Pillow", "AVIF")
        library = importlib.import_module("PIL._avif")  # `features` has no version of aom
        if not library.encoder_codec_available("aom"):
            raise _encoder_missing(self.name, "Pillow", "encoder aom for AVIF")
        codecs = dict(part.rsplit(":", 1) for part in library.codec_versions().split(", "))
        versions = f"libavif {features.version('avif')}, aom {codecs['aom [enc]']}"
        self.description = f"Pillow {PIL.__version__}, {versions}; speed 4, tuned for PSNR, one tile, 8 bit, 4:4:4"


class JPEGXL(Baseline):
    """JPEG XL (VarDCT, XYB, 4:4:4) at the default effort; it is tuned for visual quality, not for PSNR.

    Its setting is the Butteraugli distance.
    """

    name = "jxl"
    settings = (25, 16, 10, 6, 4, 2.5, 1.5, 0.9)
    whole = False
    setting_name = "distance"

    def __init__(self) -> None:
        self._imagecodecs = _library("imagecodecs", self.name)
        if not self._imagecodecs.JPEGXL.available:
            raise _encoder_missing(self.name, "imagecodecs", "JPEG XL")
        version = self._imagecodecs.jpegxl_version()  # "libjxl 0.11.2"
        self.description = f"imagecodecs {self._imagecodecs.__version__}, {version}; effort 7, XYB 4:4:4"

    def encode(self, image: np.ndarray, setting: float) -> bytes:
        return bytes(self._imagecodecs.jpegxl_encode(image, distance=float(setting), effort=7))

    def decode(self, data: bytes, height: int, width: int) -> np.ndarray:
        return self._imagecodecs.jpegxl_decode(data)


# HEVC intra in HEIF files by x265, through pillow-heif.


X265 = {
    "chroma": "444",
    "preset": "slower",
    "tune": "psnr",
    # The tuning leaves psycho-visual optimization on, which costs up to 0.5 dB.
    "x265:psy-rd": "0",
    "x265:psy-rdoq": "0",
    # Wavefronts cost bits, and x265 uses them only with several processors.
    "x265:wpp": "0",
}
TEN_BITS = 1023
"""Largest sample. 10 bits lose less in the conversion to YCbCr and back than 8 (0.15 dB at 1 bpp)."""


class HEVC(Baseline):
    """HEVC intra with a constant QP, 10 bit, 4:4:4, full-range BT.601, tuned for PSNR."""

    name = "hevc"
    settings = (45, 41, 37, 33, 29, 25, 21)
    setting_name = "QP"

    def __init__(self) -> None:
        self._heif = _library("pillow_heif", self.name)
        encoder = self._heif.libheif_info()["encoders"].get("x265")
        if not encoder:
            raise _encoder_missing(self.name, "pillow-heif", "x265")
        version = encoder.removeprefix("x265 HEVC encoder (").rstrip(")")
        self.description = (
            f"pillow-heif {self._heif.__version__}, libheif {self._heif.libheif_version()}, x265 {version}; "
            "preset slower, constant QP, tuned for PSNR, 10 bit, BT.601 full range, 4:4:4"
        )

    def encode(self, image: np.ndarray, setting: float) -> bytes:
        height, width = image.shape[:2]
        samples = np.rint(image * (TEN_BITS / 255)).astype("<u2") << 6  # the library drops the low 6 of 16 bits
        heif = self._heif.from_bytes("RGB;16", (width, height), samples.tobytes())
        file = BytesIO()
        heif.save(file, enc_params={**X265, "x265:qp": f"{setting:g}"}, matrix_coefficients=6, full_range_flag=1)
        return file.getvalue()

    def decode(self, data: bytes, height: int, width: int) -> np.ndarray:
        heif = self._heif.open_heif(BytesIO(data), convert_hdr_to_8bit=False)
        return np.rint((np.asarray(heif) >> 6) * (255 / TEN_BITS)).astype(np.uint8)


# VVC intra by VVenC, through the ffmpeg of imageio-ffmpeg.


RED, BLUE = 0.299, 0.114
"""Weights of the luma in BT.601; with BT.709, VVC needs 1.6 to 2.6 % more bits on Kodak at equal PSNR."""
GREEN = 1 - RED - BLUE
MIDDLE = 512
"""Zero of the chroma, full range; limited range changes the rate of VVC by at most 0.3 % at equal PSNR."""


def to_ycbcr(image: np.ndarray) -> bytes:
    """An image, uint8 (H, W, 3) with even sides, as yuv420p10le; chroma is halved by an antialiased bicubic filter."""
    red, green, blue = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    luma = RED * red + GREEN * green + BLUE * blue
    chroma = torch.stack(((blue - luma) / (2 * (1 - BLUE)), (red - luma) / (2 * (1 - RED))))
    halved = F.interpolate(chroma[None], scale_factor=0.5, mode="bicubic", antialias=True)[0] + MIDDLE / TEN_BITS
    return b"".join((plane * TEN_BITS).round().clamp(0, TEN_BITS).numpy().astype("<u2").tobytes()
                    for plane in (luma, *halved))  # fmt: skip


def from_ycbcr(data: bytes, height: int, width: int) -> np.ndarray:
    """The image, uint8 (height, width, 3), of yuv420p10le samples; chroma is doubled by a bicubic filter."""
    samples = torch.from_numpy(np.frombuffer(data, "<u2").astype(np.float32))
    pixels = height * width
    luma = samples[:pixels].view(height, width) / TEN_BITS
    halved = (samples[pixels:].view(1, 2, height // 2, width // 2) - MIDDLE) / TEN_BITS
    cb, cr = F.interpolate(halved, size=(height, width), mode="bicubic")[0]
    blue = luma + 2 * (1 - BLUE) * cb
    red = luma + 2 * (1 - RED) * cr
    green = (luma - RED * red - BLUE * blue) / GREEN
    rounded = (torch.stack((red, green, blue), dim=-1) * 255).round().clamp(0, 255)
    return rounded.to(torch.uint8).numpy()


SMALLEST_SIDE = 32
"""Pixels; VVenC fails on smaller images."""
START_SECONDS = 60
SECONDS_PER_MEGAPIXEL = 600
"""Time-out beyond the start: twenty times the usual duration."""
RAW = ("-f", "rawvideo", "-pix_fmt", "yuv420p10le")
ENCODER = ("-c:v", "libvvenc", "-preset", "medium", "-qpa", "0", "-threads", "1")


class VVC(Baseline):
    """VVC intra, 10 bit, 4:2:0 (the only format of VVenC), with one thread: their number changes the bitstream.

    Colours are converted here: ffmpeg's filters lose up to 1 dB. Images are padded by replication to even sides of at
    least 32 pixels and cropped after decoding; the padding costs bits.
    """

    name = "vvc"
    settings = (47, 42, 37, 32, 27, 22)
    setting_name = "QP"

    def __init__(self) -> None:
        library = _library("imageio_ffmpeg", self.name)
        grey = np.full((SMALLEST_SIDE, SMALLEST_SIDE, 3), 128, np.uint8)
        try:
            self._program = library.get_ffmpeg_exe()
            log = self._run("-loglevel", "verbose", *_encoding(grey, 32), data=to_ycbcr(grey)).stderr.decode()
            self.decode(self.encode(grey, 32), SMALLEST_SIDE, SMALLEST_SIDE)
        except (OSError, RuntimeError) as error:
            raise UserError(
                "no-vvc",
                "--against",
                f"vvc needs an ffmpeg with libvvenc and a VVC decoder ({error}); run `pip install --force-reinstall "
                '"hpcm-scale[codecs]"`, or omit vvc',
            ) from error
        version = re.search(r"libvvenc version: (\S+)", log)
        self.description = (
            f"imageio-ffmpeg {library.__version__}, ffmpeg {library.get_ffmpeg_version()}, "
            f"VVenC{f' {version[1]}' if version else ''}; preset medium, qpa 0, 10 bit, BT.601 full range, 4:2:0"
        )

    def encode(self, image: np.ndarray, setting: float) -> bytes:
        """See `Baseline.encode`; the bitstream."""
        height, width = image.shape[:2]
        image = np.pad(image, ((0, _padded(height) - height), (0, _padded(width) - width), (0, 0)), mode="edge")
        return self._run(*_encoding(image, setting), data=to_ycbcr(image), pixels=height * width).stdout

    def decode(self, data: bytes, height: int, width: int) -> np.ndarray:
        rows, columns = _padded(height), _padded(width)
        samples = self._run("-f", "vvc", "-i", "-", *RAW, "-", data=data, pixels=height * width).stdout
        if len(samples) != 3 * rows * columns:  # 2 bytes for each of 1.5 samples per pixel
            raise RuntimeError(f"ffmpeg decoded {len(samples)} bytes instead of {3 * rows * columns}")
        return from_ycbcr(samples, rows, columns)[:height, :width]

    def _run(self, *arguments: str, data: bytes, pixels: int = 0) -> subprocess.CompletedProcess[bytes]:
        """Run ffmpeg on `data`. Raises RuntimeError if it fails or hangs, given the image's number of pixels."""
        command = (self._program, "-hide_banner", "-nostdin", "-loglevel", "error", *arguments)
        limit = START_SECONDS + SECONDS_PER_MEGAPIXEL * pixels / 1e6
        try:
            done = subprocess.run(command, input=data, capture_output=True, timeout=limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"ffmpeg timed out after {limit:.0f} seconds") from None
        if done.returncode:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"ffmpeg failed with exit code {done.returncode}: {lines[0] if lines else 'no message'}")
        return done


def _encoding(image: np.ndarray, setting: float) -> tuple[str, ...]:
    """ffmpeg's arguments that map raw samples to a bitstream."""
    height, width = image.shape[:2]
    return (*RAW, "-s", f"{width}x{height}", "-i", "-", *ENCODER, "-qp", f"{setting:g}", "-f", "vvc", "-")


def _padded(side: int) -> int:
    return max(SMALLEST_SIDE, side + side % 2)


BASELINES: dict[str, Callable[[], Baseline]] = {codec.name: codec for codec in (JPEG, WebP, AVIF, JPEGXL, HEVC, VVC)}


def open_baseline(name: str) -> Baseline:
    """The codec called `name`. Raises UserError for an unknown name, and if a library or an encoder is missing."""
    if name not in BASELINES:
        raise UserError(
            "unknown-baseline", "--against", f"there is no codec {name!r}; choose from {', '.join(BASELINES)}"
        )
    return BASELINES[name]()
