"""The `.hpcm` file: a header of 46 bytes, then the streams of z and y (docs/file_format.md)."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from hpcm_scale.errors import UserError

MAGIC = b"HPCM"
VERSION = 1
"""Of the layout of the file."""
TABLE_VERSION = 1
"""Of what the bytes of the streams mean: tables, their order, range coder, shifts."""
MOST_PIXELS = 2**28
"""Of an image: 268 million. A header that asks for more is not believed."""

_HEADER = struct.Struct("<4sBB8sIIIIIII")
_CHECKSUM = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size


@dataclass(frozen=True)
class Container:
    """The content of a file."""

    digest: bytes
    """Of the weights: the first 8 bytes of `model.weights.digest`."""
    width: int
    height: int
    z: bytes
    y: bytes
    symbols_checksum: int
    """CRC-32 of all symbols, int32 little-endian, z's before y's, in coding order."""


def pack(content: Container) -> bytes:
    """The bytes of the file."""
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        TABLE_VERSION,
        content.digest,
        content.width,
        content.height,
        len(content.z),
        zlib.crc32(content.z),
        len(content.y),
        zlib.crc32(content.y),
        content.symbols_checksum,
    )
    return header + _CHECKSUM.pack(zlib.crc32(header)) + content.z + content.y


def unpack(data: bytes) -> Container:
    """The content of a file's bytes.

    Raises UserError if they are no such file, of another version, damaged, cut short or too long.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise UserError("it is not an .hpcm file; name one that `hpcm encode` wrote")
    if len(data) < HEADER_BYTES:
        raise UserError(f"it is cut short within its header ({len(data)} bytes); copy it again from its source")
    header = data[: _HEADER.size]
    _, version, tables, digest, width, height, z_bytes, z_crc, y_bytes, y_crc, symbols_checksum = _HEADER.unpack(header)
    if (version, tables) != (VERSION, TABLE_VERSION):
        raise UserError(
            f"it is of version {version}.{tables} and this hpcm_scale reads {VERSION}.{TABLE_VERSION}; "
            "decode it with the version that wrote it"
        )
    if _CHECKSUM.unpack_from(data, _HEADER.size) != (zlib.crc32(header),):
        raise UserError("its header is damaged; copy it again from its source")
    if not (width > 0 and height > 0 and width * height <= MOST_PIXELS):
        raise UserError(f"its header asks for an impossible image of {width}×{height}; copy it again from its source")
    if len(data) != HEADER_BYTES + z_bytes + y_bytes:
        wanted = HEADER_BYTES + z_bytes + y_bytes
        raise UserError(f"it has {len(data)} bytes where its header says {wanted}; copy it again from its source")
    z, y = data[HEADER_BYTES : HEADER_BYTES + z_bytes], data[HEADER_BYTES + z_bytes :]
    for name, stream, checksum in (("z", z, z_crc), ("y", y, y_crc)):
        if zlib.crc32(stream) != checksum:
            raise UserError(f"its stream of {name} is damaged; copy it again from its source")
    return Container(digest, width, height, z, y, symbols_checksum)
