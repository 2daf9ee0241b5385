"""JPEG files that promise fewer rows than they hold: their decoders stop early.

The rows of a JPEG are coded one after the other, so that decoding costs what lies above and left of the last pixel
needed. The number of rows stands in the frame header, and a smaller one there ends decoding after so many rows.
"""

from __future__ import annotations

FRAMES = frozenset({0xC0, 0xC1, 0xC2})
"""Markers of frames whose height may be lowered: sequential and progressive, Huffman coded."""
SEGMENTS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
"""Markers of segments that may lie before the frame: tables, restart interval, comment, application data."""
SIDE = 8
"""Rows of a block of coefficients."""


def shortened(data: bytes, rows: int) -> bytes:
    """The same JPEG with a header that promises fewer rows, at least `rows` and no more than there are.

    Its first `rows` rows decode to the same pixels. Of what is no such JPEG, `data` itself.
    """
    at = frame_of(data)
    if at is None:
        return data
    height = int.from_bytes(data[at + 3 : at + 5], "big")
    components = data[at + 7]
    blocks = max((data[at + 9 + 3 * i] & 15 for i in range(components)), default=0)
    # Rows are coded in units; where colour is subsampled, the last rows of one mix with the first of the next.
    unit = SIDE * blocks
    promised = unit and (-(-rows // unit) + 1) * unit
    if not 0 < promised < height:
        return data
    return data[: at + 3] + promised.to_bytes(2, "big") + data[at + 5 :]


def frame_of(data: bytes) -> int | None:
    """Where the frame header of a JPEG lies (its length, of two bytes), if it is whole and one of `FRAMES`.

    After the length follow the bits of a sample (1 byte), height (2), width (2), number of components (1), and of each
    its name, its sampling factors (horizontal · 16 + vertical) and its table, a byte each.
    """
    at = 2 if data[:2] == b"\xff\xd8" else len(data)
    while data[at : at + 1] == b"\xff":
        marker = data[at + 1 : at + 2]
        if marker == b"\xff":  # fill
            at += 1
            continue
        kind = marker[0] if marker else 0
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if kind in FRAMES:
            whole = length >= 8 and len(data) >= at + 2 + length and length == 8 + 3 * data[at + 9]
            return at + 2 if whole else None
        if kind not in SEGMENTS:
            return None
        at += 2 + length
    return None
