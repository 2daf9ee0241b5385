"""PNG files: the chunks that determine the pixels, and the transparent colour in the file's own bit depth."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE = 0, 2, 3
"""Colour types that may have a tRNS chunk."""
SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, 4: 2, 6: 4}
"""Samples of a pixel, by colour type."""
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row and their steps, per pass of an interlaced image."""
RAW_EXIF = b"Raw profile type exif\0"
"""Keyword of text chunks with EXIF as hexadecimal digits, used before PNG had a chunk for it."""
COMPRESSED = 1 << 16
"""Bytes decompressed at once, to at most 1,032 times as many."""
LONGEST_RAW_EXIF = 1 << 18
"""Characters of such a text chunk that are read."""


class Png(NamedTuple):
    """The parts of a PNG file that are used."""

    file: bytes
    """The same image without the other chunks."""
    exif: bytes
    """The EXIF block, or b""."""
    depth: int
    """Bits of a sample."""
    colour: tuple[int, ...] | None
    """The samples of the transparent colour of a grey or RGB image, or None."""


def read_png(data: bytes) -> Png:
    """Split a PNG file; chunks that do not determine the pixels are removed without checks.

    IHDR, PLTE, tRNS, IDAT and EXIF are used; of an animation, the default image. Raises `ValueError` if one of the
    first four has a wrong checksum, if a required one is missing, or if tRNS is too short; Pillow's
    `UnidentifiedImageError` without a header.
    """
    used: dict[bytes, bytes] = {}
    pixels: list[bytes] = []
    exif, raw_exif = b"", None
    for kind, at, end in _chunks(data):
        if kind == b"IDAT" or (kind in (b"IHDR", b"PLTE", b"tRNS") and kind not in used and not pixels):
            if end + 4 <= len(data) and not _is_whole(data, at, end):  # Pillow reports truncated chunks
                raise ValueError(f"its {kind.decode()} chunk is damaged")
            if kind == b"IDAT":
                pixels.append(data[at - 8 : end + 4])
            else:
                used[kind] = data[at:end]
        elif kind == b"eXIf" and _is_whole(data, at, end):
            exif = data[at:end]
        elif kind in (b"tEXt", b"zTXt") and raw_exif is None and data.startswith(RAW_EXIF, at):
            raw_exif = _raw_exif(kind, data[at + len(RAW_EXIF) : end])
    header = used.pop(b"IHDR", b"")
    if len(header) != 13:
        raise Image.UnidentifiedImageError
    if not pixels:
        raise ValueError("it has no pixels")
    depth, kind = header[8:10]
    transparency = used.pop(b"tRNS", None)
    colour = None
    if kind == PALETTE:
        if b"PLTE" not in used:
            raise ValueError("it has no palette")
        if transparency is not None:
            used[b"tRNS"] = transparency[:256]
    elif kind in (GREY, RGB) and transparency is not None:
        samples = 1 if kind == GREY else 3
        if len(transparency) < 2 * samples:
            raise ValueError("its tRNS chunk is too short")
        # Only the low bits count, those of the bit depth.
        colour = tuple(int.from_bytes(transparency[2 * i : 2 * i + 2], "big") % (1 << depth) for i in range(samples))
    before = [_chunk(b"IHDR", header), *(_chunk(*item) for item in used.items())]
    return Png(b"".join((SIGNATURE, *before, *pixels)), exif or raw_exif or b"", depth, colour)


def lacks_pixels(file: bytes) -> bool:
    """Whether the coded data of a PNG ends before its last row; Pillow decodes missing rows to zeros.

    `file` is that of `read_png`.
    """
    width, height, depth, kind, *_, interlaced = struct.unpack_from(">IIBBBBB", file, 16)
    missing = 0
    for left, top, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // across), -((top - height) // down)
        if columns > 0:
            missing += max(rows, 0) * (1 + -(-columns * SAMPLES[kind] * depth // 8))
    inflate = zlib.decompressobj()
    for chunk, at, end in _chunks(file):
        for start in range(at, end if chunk == b"IDAT" else at, COMPRESSED):
            missing -= len(inflate.decompress(file[start : min(start + COMPRESSED, end)]))
            if missing <= 0:
                return False
    return True


def with_alpha(image: Image.Image, png: Png) -> Image.Image:
    """The loaded `image` with an alpha channel: 0 where its samples equal `png.colour`, 255 elsewhere.

    8 bits per sample; of 16 bits the high byte. The image itself if there is no such colour.
    """
    values = png.colour
    if values is None:
        return image
    if png.depth < 8:  # Pillow scaled the samples up
        image = image.convert("L")
        values = tuple(value * 255 // ((1 << png.depth) - 1) for value in values)
    planes = image.split()
    if png.depth == 16 and len(values) == 3:  # Pillow kept the high bytes
        planes += _low_bytes(png.file).split()
        values = (*(value >> 8 for value in values), *(value & 255 for value in values))
    matches = np.ones(image.size[::-1], bool)
    for plane, value in zip(planes, values, strict=True):
        matches &= np.asarray(plane) == value
    image = high_byte(image) if image.mode.startswith("I") else image.copy()
    image.putalpha(Image.fromarray(np.where(matches, 0, 255).astype(np.uint8)))
    return image


def high_byte(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey; Pillow itself converts 16-bit colour alike."""
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _low_bytes(file: bytes) -> Image.Image:
    """The low bytes of a PNG of 16-bit RGB: decoding the samples as little-endian keeps them."""
    image = Image.open(BytesIO(file), formats=("PNG",))
    image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
    image.load()
    return image


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of the content of every chunk before IEND; the last may be truncated."""
    at = len(SIGNATURE)
    while (kind := data[at + 4 : at + 8]) != b"IEND" and kind.isalpha() and len(kind) == 4:
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        yield kind, at + 8, end
        at = end + 4


def _is_whole(data: bytes, at: int, end: int) -> bool:
    """Whether the chunk with content at that range has the right checksum."""
    return zlib.crc32(memoryview(data)[at - 4 : end]) == int.from_bytes(data[end : end + 4], "big")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def _raw_exif(kind: bytes, text: bytes) -> bytes:
    """The EXIF block in a text chunk of the keyword `RAW_EXIF`; b"" if it is malformed."""
    with suppress(zlib.error, ValueError):
        if kind == b"zTXt":  # the first byte is the method
            text = zlib.decompressobj().decompress(text[1:], LONGEST_RAW_EXIF)
        lines = text[:LONGEST_RAW_EXIF].split(b"\n")  # the first three are empty, the name and the length
        return bytes.fromhex(b"".join(lines[3:]).decode("ascii"))
    return b""
