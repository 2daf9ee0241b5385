"""Image files in memory."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Of a pixel, by the colour type of a PNG."""
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row, first column, and the steps between rows and columns of each pass."""
END = b"\xff\xd9"
"""The end marker of a JPEG."""


class Decoded:
    """A decoded image as `cut` takes an `EncodedImage`."""

    def __init__(self, image: Image.Image) -> None:
        self.size = image.size
        self._image = image

    def decode(self) -> Image.Image:
        return self._image

    def decode_box(self, box: tuple[int, int, int, int]) -> Image.Image:
        return self._image.crop(box)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    with BytesIO() as handle:
        image.save(handle, kind, **options)
        return handle.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    samples: np.ndarray,
    depth: int,
    color_type: int,
    before: Sequence[bytes] = (),
    after: Sequence[bytes] = (),
    interlaced: bool = False,
) -> bytes:
    """A PNG of samples (H, W) or (H, W, samples of a pixel), with whole chunks before and after the pixels."""
    samples = samples.reshape(*samples.shape[:2], SAMPLES[color_type])
    height, width = samples.shape[:2]
    passes = [samples[y::dy, x::dx] for y, x, dy, dx in ADAM7] if interlaced else [samples]
    pixels = b"".join(scanlines(part, depth) for part in passes if part.size)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, interlaced))
    half = len(pixels) // 2
    stream = zlib.compressobj()
    parts = [stream.compress(pixels[:half]) + stream.flush(zlib.Z_SYNC_FLUSH), stream.compress(pixels[half:])]
    parts.append(stream.flush())
    return b"".join(
        [SIGNATURE, header, *before, *(chunk(b"IDAT", part) for part in parts), *after, chunk(b"IEND", b"")]
    )


def scanlines(samples: np.ndarray, depth: int) -> bytes:
    """Rows (H, W, C), packed; filtered by none, by the pixel on the left and by the row above, in turns."""
    if depth == 16:
        rows = samples.astype(">u2").reshape(len(samples), -1).view(np.uint8)
    else:
        flat = samples.astype(np.uint8).reshape(len(samples), -1)
        bits = np.unpackbits(flat[..., None], axis=-1)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(len(samples), -1), axis=-1)
    step = max(samples.shape[2] * depth // 8, 1)
    left = np.pad(rows, ((0, 0), (step, 0)))[:, : rows.shape[1]]
    above = np.pad(rows, ((1, 0), (0, 0)))[:-1]
    filtered = [rows[i] - (np.zeros_like(left), left, above)[i % 3][i] for i in range(len(rows))]
    return b"".join(bytes((i % 3,)) + row.tobytes() for i, row in enumerate(filtered))


def png16(pixels: np.ndarray, color_type: int) -> bytes:
    """A 16-bit PNG, which Pillow cannot write in colour."""
    return png(pixels, 16, color_type)


def segment(marker: int, content: bytes) -> bytes:
    """One segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def scans(data: bytes) -> list[int]:
    """Where the scan headers of a JPEG are, if there is no such marker in its metadata."""
    return [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]


def first_scans(data: bytes, number: int) -> bytes:
    """A progressive JPEG that ends after its first scans; the tables of the next one are left out."""
    starts = scans(data)
    part = data[: starts[number]]
    tables = part.rfind(b"\xff\xc4")
    return (part[:tables] if tables > starts[number - 1] else part) + END


def scan_by_scan(image: Image.Image) -> bytes:
    """A sequential JPEG with a scan for each component: those of three grey ones, put together."""
    greys = [encoded(channel, "JPEG", quality=85) for channel in image.split()]
    frame, scan = greys[0].index(b"\xff\xc0"), scans(greys[0])[0]
    size = greys[0][frame + 5 : frame + 9]
    components = b"".join(bytes((i, 0x11, 0)) for i in (1, 2, 3))
    parts = [greys[0][:frame], segment(0xC0, b"\x08" + size + b"\x03" + components)]
    parts.append(greys[0][frame + 2 + int.from_bytes(greys[0][frame + 2 : frame + 4], "big") : scan])
    for i, grey in enumerate(greys, 1):
        content = grey[scans(grey)[0] + 10 : -2]
        parts.append(segment(0xDA, bytes((1, i, 0, 0, 63, 0))) + content)
    return b"".join(parts) + END
