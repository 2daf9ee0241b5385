"""WebP files without metadata."""

from __future__ import annotations

USED = frozenset({b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L"})
"""Types of the chunks that decide about the pixels."""


def is_webp(data: bytes) -> bool:
    """By its first bytes."""
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def read_webp(data: bytes) -> tuple[bytes, bytes]:
    """The same WebP with the chunks that decide about the pixels alone, and its EXIF block, if there is one."""
    whole = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    at, kept, exif = 12, [], b""
    while at + 8 <= whole:
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        content = at + 8
        at = content + length + length % 2
        if kind in USED:
            kept.append(data[content - 8 : at])
        elif kind == b"EXIF":
            exif = exif or data[content : content + length]
    body = b"".join((b"WEBP", *kept))
    return b"".join((b"RIFF", len(body).to_bytes(4, "little"), body)), exif
