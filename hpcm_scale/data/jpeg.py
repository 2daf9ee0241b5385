"""JPEG files as sequences of marker segments: without metadata, truncated to fewer rows, or with added coded data.

The rows of a JPEG are coded in order. The frame header holds their number: a smaller one there ends decoding early.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

START = b"\xff\xd8"
EXIF = b"Exif\0\0"
SEQUENTIAL, PROGRESSIVE = (0xC0, 0xC1), 0xC2
"""Markers of Huffman-coded frames, the only ones that this module processes."""
OTHER_FRAMES = frozenset({*range(0xC3, 0xD0)} - {0xC4, 0xC8, 0xCC})
TEMPORARY, END, SCAN, COMMENT = 0x01, 0xD9, 0xDA, 0xFE
APP0, APP1, APP14, APP15 = 0xE0, 0xE1, 0xEE, 0xEF
RESTART_INTERVAL = b"\xff\xdd"
"""Marker of the segment that announces restart markers."""
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
"""A segment marker: no stuffed zero, restart marker or fill byte."""
SIDE = 8
"""Rows of a block of coefficients."""
CONTEXT, SMOOTHING = 1, 2
"""Rows of units below a pixel that it depends on: subsampled colour is interpolated, and where scans of a progressive
file are missing, libjpeg estimates coefficients from the surrounding blocks."""
ONES = b"\xff\0" * 8
"""Coded data outside every Huffman code: 64 bits, the most that libjpeg reads ahead."""
NOISE = b"".join(random.Random(n).randbytes(64).replace(b"\xff", b"") + bytes((0xFF, 0xD0 + n)) for n in range(8))
"""Coded data with every restart marker that decodes to coefficients under any Huffman code."""


class Segment(NamedTuple):
    """A marker and its content."""

    kind: int
    start: int
    """Position of its marker."""
    stop: int
    """End of its content. After a scan header, coded data follows up to the next segment."""


class Jpeg(NamedTuple):
    """The parts of a JPEG file that are used."""

    file: bytes
    """The same image without metadata; without an end marker unless `scans`."""
    exif: bytes
    """The EXIF block, or b""."""
    scans: bool
    """Whether it may have several scans, Huffman-coded."""


def read_jpeg(data: bytes) -> Jpeg:
    """Split a JPEG file; application data and comments before the first scan are removed.

    JFIF and Adobe segments, which determine the colour space, are kept if they are long enough for libjpeg. Raises
    `ValueError` if there is no scan, or if samples do not have 8 bits.

    Where coded data is missing before an end marker, decoders fill in grey blocks without an error. In a sequential
    JPEG with one scan, other bits replace the marker: enough to read ahead, too few for more than two blocks, so that
    decoding fails if and only if data is missing.
    """
    kept, exif = [START], b""
    for kind, start, stop in segments(data):
        if kind == SCAN:
            break
        content = data[start + 4 : stop]
        if kind == APP1 and content.startswith(EXIF):
            exif = exif or content
        is_jfif = kind == APP0 and content.startswith(b"JFIF\0") and len(content) >= 14
        is_adobe = kind == APP14 and content.startswith(b"Adobe") and len(content) >= 12
        if is_jfif or is_adobe or not (APP0 <= kind <= APP15 or kind == COMMENT):
            kept.append(data[start:stop])
    else:
        raise ValueError("image file is truncated")
    head = b"".join(kept)
    frame = frame_of(head)
    if frame is None:
        return Jpeg(head + data[start:], exif, scans=False)
    if (bits := head[frame.start + 4]) != 8:
        raise ValueError(f"JPEG files with {bits} bits a sample are not supported")
    components, of_scan = head[frame.start + 9], data[start + 4 : start + 5]
    if frame.kind == PROGRESSIVE or of_scan != bytes((components,)):
        return Jpeg(head + data[start:], exif, scans=True)
    end = MARKER.search(data, stop)
    return Jpeg(head + (data[start : end.start()] + ONES if end else data[start:]), exif, scans=False)


def disturbed(data: bytes) -> bytes:
    """The same JPEG with coded data added to every scan: it decodes to other pixels if a scan's data was truncated.

    Missing whole scans are not detected.
    """
    parts, at, in_scan = [], 0, False
    for kind, start, _ in segments(data):
        if in_scan:
            parts += data[at:start].rstrip(b"\xff"), NOISE  # fill bytes would turn it into a marker
            at = start
        in_scan = kind == SCAN
    return b"".join((*parts, data[at:]))


def shortened(data: bytes, rows: int) -> bytes:
    """The same JPEG with fewer rows in its header, at least `rows`; its first `rows` rows decode to the same pixels.

    Other files, and progressive JPEGs with restart markers, are returned unchanged.
    """
    frame = frame_of(data)
    # Smoothing ends where coded data is missing; after a restart marker it begins again, at any row below.
    if frame is None or (frame.kind == PROGRESSIVE and RESTART_INTERVAL in data):
        return data
    at = frame.start + 5
    height = int.from_bytes(data[at : at + 2], "big")
    unit = SIDE * max((sampling & 15 for sampling in data[frame.start + 11 : frame.stop : 3]), default=0)
    below = CONTEXT + (SMOOTHING if frame.kind == PROGRESSIVE else 0)
    kept_rows = unit and (-(-rows // unit) + below) * unit
    if not 0 < kept_rows < height:
        return data
    return data[:at] + kept_rows.to_bytes(2, "big") + data[at + 2 :]


def frame_of(data: bytes) -> Segment | None:
    """The frame header of a JPEG, or None if it is incomplete or not Huffman-coded.

    Layout: marker and length (2 bytes each), bits of a sample (1), height (2), width (2), number of components (1), and
    per component its name, sampling factors (horizontal · 16 + vertical) and table (1 each).
    """
    if not data.startswith(START):
        return None
    for frame in segments(data):
        kind, start, stop = frame
        if kind in SEQUENTIAL or kind == PROGRESSIVE:
            whole = stop - start >= 10 and stop <= len(data) and stop - start == 10 + 3 * data[start + 9]
            return frame if whole else None
        if kind in OTHER_FRAMES or kind == SCAN:
            return None
    return None


def segments(data: bytes) -> Iterator[Segment]:
    """The segments of a JPEG up to its end marker or the end of data; bytes between them are skipped."""
    at = len(START)
    while marker := MARKER.search(data, at):
        start, at = marker.span()
        kind = data[at - 1]
        if kind not in (TEMPORARY, END):
            at += max(int.from_bytes(data[at : at + 2], "big"), 2)  # the length counts itself
        yield Segment(kind, start, at)
        if kind == END:
            return
