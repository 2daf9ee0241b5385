"""VVC still pictures by VVenC, through the ffmpeg that imageio-ffmpeg brings along."""

from __future__ import annotations

import re
import subprocess

import numpy as np

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.other_codecs.base import OtherCodec, optional_library
from hpcm_scale.evaluation.other_codecs.ycbcr import from_ycbcr, to_ycbcr

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
