"""What every other codec offers: its name, its versions and settings, and a real file of an image."""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import ModuleType
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hpcm_scale.errors import UserError

# RGB to the 10-bit 4:2:0 pictures that video codecs take, and back.


RED, BLUE = 0.299, 0.114
"""Shares of the luma in BT.601: with BT.709, VVC needs 1.6 to 2.6 % more bits on Kodak images for the same PSNR."""
GREEN = 1 - RED - BLUE
LARGEST, MIDDLE = 1023, 512
"""Full range: the limited one moves VVC's points along the same curve (within 0.3 % of the rate)."""


def to_ycbcr(image: np.ndarray) -> bytes:
    """An image, uint8 (H, W, 3) with even sides, as yuv420p10le; the chroma is halved by an antialiased bicubic."""
    red, green, blue = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    luma = RED * red + GREEN * green + BLUE * blue
    chroma = torch.stack(((blue - luma) / (2 * (1 - BLUE)), (red - luma) / (2 * (1 - RED))))
    halved = F.interpolate(chroma[None], scale_factor=0.5, mode="bicubic", antialias=True)[0]
    return b"".join(_samples(plane) for plane in (luma, *(halved + MIDDLE / LARGEST)))


def from_ycbcr(data: bytes, height: int, width: int) -> np.ndarray:
    """The image, uint8 (height, width, 3), of a picture in yuv420p10le, its chroma doubled by a bicubic."""
    samples = torch.from_numpy(np.frombuffer(data, "<u2").astype(np.float32))
    pixels = height * width
    luma = samples[:pixels].view(height, width) / LARGEST
    halved = (samples[pixels:].view(1, 2, height // 2, width // 2) - MIDDLE) / LARGEST
    blueness, redness = F.interpolate(halved, size=(height, width), mode="bicubic")[0]
    blue = luma + 2 * (1 - BLUE) * blueness
    red = luma + 2 * (1 - RED) * redness
    green = (luma - RED * red - BLUE * blue) / GREEN
    rounded = (torch.stack((red, green, blue), dim=-1) * 255).round().clamp(0, 255)
    return rounded.to(torch.uint8).numpy()


def _samples(plane: Tensor) -> bytes:
    """Values of 0…1 as little-endian integers of 10 bits in 16."""
    return (plane * LARGEST).round().clamp(0, LARGEST).numpy().astype("<u2").tobytes()


REFUSALS = (OSError, RuntimeError, ValueError, Image.DecompressionBombError)
"""What the libraries raise for an image they cannot code."""


class OtherCoded(NamedTuple):
    """One image through another codec."""

    size_bytes: int
    """Of the whole file; of VVC, which has no file of its own, of the bitstream."""
    decoded: Tensor
    """uint8 (3, H, W)."""
    encode_seconds: float
    """From pixels in memory to bytes in memory, the change of colours and the start of a program included."""
    decode_seconds: float


class OtherCodec(ABC):
    """A codec with all its settings fixed but the one that trades rate for quality.

    To construct it raises `UserError` where what it needs is not installed.
    """

    name: ClassVar[str]
    settings: ClassVar[Sequence[float]]
    """From small files to large ones: from 0.1 bpp or less to about 2 on the Kodak images."""
    knob: ClassVar[str] = "quality"
    """What a setting is called."""
    description: str
    """One line: the library, the versions, what is fixed, the chroma format."""

    def label(self, setting: float) -> str:
        """A setting by its name: "quality 50", "QP 32"."""
        return f"{self.knob} {setting:g}"

    def code(self, pixels: Tensor, setting: float) -> OtherCoded:
        """Encode `pixels`, uint8 (3, H, W), at one of `settings`, and decode the file again.

        Raises `UserError` for an image the codec cannot code (too large for its format, say) and for an
        external program that fails or hangs.
        """
        height, width = pixels.shape[1:]
        image = np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())
        try:
            start = time.perf_counter()
            data = self.encode(image, setting)
            encoded = time.perf_counter()
            decoded = self.decode(data, height, width)
            done = time.perf_counter()
        except REFUSALS as error:
            raise UserError(
                f"{self.name} cannot code an image of {width}×{height} pixels at {self.label(setting)} ({error}); "
                "leave out the image or the codec"
            ) from error
        assert decoded.shape == image.shape and decoded.dtype == np.uint8
        planes = torch.from_numpy(np.ascontiguousarray(decoded.transpose(2, 0, 1)))
        return OtherCoded(len(data), planes, encoded - start, done - encoded)

    @abstractmethod
    def encode(self, image: np.ndarray, setting: float) -> bytes:
        """The file of an image, uint8 (H, W, 3). Raises one of `REFUSALS` where it cannot be made."""

    @abstractmethod
    def decode(self, data: bytes, height: int, width: int) -> np.ndarray:
        """The image in a file, uint8 (height, width, 3)."""


def optional_library(module: str, codec: str) -> ModuleType:
    """Import a library of the extra `codecs`; raises `UserError` where it is missing or broken."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f'{codec} needs the library {module} ({error}); pip install "hpcm-scale[codecs]", or leave {codec} out'
        ) from error
