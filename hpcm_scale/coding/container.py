"""The `.hpcm` file format: a header of 46 or 47 bytes and the streams of z and y (docs/file_format.md)."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from hpcm_scale.errors import UserError

MAGIC = b"HPCM"
FIXED_RATE, VARIABLE_RATE = 1, 2
"""Versions of the file layout; the second adds one byte to the header, the level."""
TABLE_VERSION = 1
"""Version of the coding of the streams: tables, their order, range coder, shifts."""
_READABLE = f"{FIXED_RATE}.{TABLE_VERSION} and {VARIABLE_RATE}.{TABLE_VERSION}"
MOST_PIXELS = 2**28
"""Most pixels of an image, 268 million; a header with more is refused."""

_HEADER = struct.Struct("<4sBB8sIIIIIII")
_LEVEL_BYTES = {FIXED_RATE: 0, VARIABLE_RATE: 1}
"""Extension of the header in each version."""
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size
"""Length of the shortest header."""


@dataclass(frozen=True)
class Container:
    """The content of a file."""

    digest: bytes
    """The first 8 bytes of `model.weights.digest`."""
    width: int
    height: int
    z: bytes
    y: bytes
    symbols_checksum: int
    """CRC-32 of all symbols, int32 little-endian: z, then y in coding order."""
    level: int | None = None
    """0 to 255 for a variable-rate model (`model.variable_rate.level_of_byte`), None at fixed rate."""


def pack(content: Container) -> bytes:
    """Serialize a file."""
    version = FIXED_RATE if content.level is None else VARIABLE_RATE
    header = _HEADER.pack(
        MAGIC,
        version,
        TABLE_VERSION,
        content.digest,
        content.width,
        content.height,
        len(content.z),
        zlib.crc32(content.z),
        len(content.y),
        zlib.crc32(content.y),
        content.symbols_checksum,
    ) + bytes(() if content.level is None else (content.level,))
    return header + _CHECKSUM.pack(zlib.crc32(header)) + content.z + content.y


def unpack(data: bytes) -> Container:
    """Parse a file. Raises UserError if it is no `.hpcm` file, of another version, damaged, truncated or too long."""
    if data[: len(MAGIC)] != MAGIC:
        raise UserError("not-hpcm-file", "", "it is not an .hpcm file; give one written by `hpcm encode`")
    if len(data) < HEADER_BYTES:
        raise UserError(
            "truncated-header", "", f"its header is truncated ({len(data)} bytes); copy it again from its source"
        )
    fields = _HEADER.unpack_from(data)
    _, version, tables, digest, width, height, z_bytes, z_crc, y_bytes, y_crc, symbols_checksum = fields
    if version not in _LEVEL_BYTES or tables != TABLE_VERSION:
        raise UserError(
            "file-version",
            "",
            f"its version is {version}.{tables}, but this hpcm_scale reads {_READABLE}; decode it with the version "
            "that wrote it",
        )
    size = _HEADER.size + _LEVEL_BYTES[version]
    header, checksum, streams = data[:size], data[size : size + _CHECKSUM.size], data[size + _CHECKSUM.size :]
    if checksum != _CHECKSUM.pack(zlib.crc32(header)):
        raise UserError("damaged-header", "", "its header is damaged; copy it again from its source")
    level = header[-1] if version == VARIABLE_RATE else None
    if not (width > 0 and height > 0 and width * height <= MOST_PIXELS):
        raise UserError(
            "impossible-image-size",
            "",
            f"its header has an impossible image size, {width}×{height}; copy it again from its source",
        )
    if len(streams) != z_bytes + y_bytes:
        wanted = len(data) - len(streams) + z_bytes + y_bytes
        raise UserError(
            "file-length",
            "",
            f"it has {len(data)} bytes instead of the {wanted} of its header; copy it again from its source",
        )
    z, y = streams[:z_bytes], streams[z_bytes:]
    for name, stream, checksum in (("z", z, z_crc), ("y", y, y_crc)):
        if zlib.crc32(stream) != checksum:
            raise UserError("damaged-stream", "", f"its stream of {name} is damaged; copy it again from its source")
    return Container(digest, width, height, z, y, symbols_checksum, level)
