"""Metadata refuses no image and is not unfolded; of all of it, EXIF orientation alone changes pixels."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import chunk, encoded, png, segment
from PIL import Image

from hpcm_scale.data.build import examine
from hpcm_scale.data.images import AS_STORED, ORIENTATIONS, EncodedImage, decode, orientation_of
from hpcm_scale.data.sources import Source, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
IMAGE = Image.fromarray(PIXELS)
JPEG = encoded(IMAGE, "JPEG", quality=95)
XMP = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
MEGABYTE = zlib.compress(b"y" * 1_000_000)
SIDEWAYS = b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, 6, 0, 0)
"""An EXIF block with orientation 6."""


def damaged(whole: bytes) -> bytes:
    """A chunk whose checksum is wrong."""
    return whole[:-1] + bytes((whole[-1] ^ 1,))


def mpf(*entries: bytes) -> bytes:
    return b"MPF\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def profile(exif: bytes) -> bytes:
    """EXIF as programs put it into a text chunk."""
    digits = (b"Exif\0\0" + exif).hex().encode()
    lines = [digits[at : at + 72] for at in range(0, len(digits), 72)]
    return b"\nexif\n%8d\n" % (len(exif) + 6) + b"\n".join(lines) + b"\n"


ANCILLARY = (
    b"gAMA cHRM sRGB iCCP sBIT bKGD hIST pHYs sPLT tIME tEXt zTXt iTXt eXIf acTL fcTL fdAT cICP zzZz ABCD"
).split()
PNG_CHUNKS = {
    "text of 2 MB in 6 kB": [chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"prompt " * 300_000))],
    "international text": [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(3_000_000)))],
    "plain text of 3 MB": [chunk(b"tEXt", b"workflow\0" + b"x" * 3_000_000)],
    "a profile of 2 MB": [chunk(b"iCCP", b"big\0\0" + zlib.compress(bytes(2_000_000)))],
    "a profile of an unknown method": [chunk(b"iCCP", b"odd\0\7" + b"x" * 50)],
    "many texts": [chunk(b"zTXt", b"k%d\0\0" % i + MEGABYTE) for i in range(70)],
    "many small chunks": [chunk(b"tEXt", b"")] * 20_000,
    "EXIF as text, a bomb": [chunk(b"zTXt", b"Raw profile type exif\0\0" + MEGABYTE * 9)] * 30,
    "EXIF as text, no digits": [chunk(b"tEXt", b"Raw profile type exif\0\n\n\nrubbish \xff")],
    **{f"{kind.decode()}, its checksum": [damaged(chunk(kind, b"Comment\0hello"))] for kind in ANCILLARY},
    **{f"{kind.decode()}, empty": [chunk(kind, b"")] for kind in ANCILLARY},
    **{f"{kind.decode()}, rubbish": [chunk(kind, b"\xff" * 99)] for kind in ANCILLARY},
}


@pytest.mark.parametrize("name", PNG_CHUNKS)
def test_png_chunks_that_are_not_used(name):
    for place in ("before", "after"):
        data = png(PIXELS, 8, 2, **{place: PNG_CHUNKS[name]})
        assert (np.asarray(decode(data)) == PIXELS).all()
        assert (np.asarray(EncodedImage(data).decode_box((3, 5, 20, 30))) == PIXELS[5:30, 3:20]).all()


def test_what_follows_the_pixels_of_a_png_may_be_missing():
    whole = png(PIXELS, 8, 2, after=[chunk(b"tEXt", b"Comment\0hello")])
    for end in (whole.index(b"tEXt") + 9, whole.index(b"IEND") - 4, len(whole) - 4):
        assert (np.asarray(decode(whole[:end])) == PIXELS).all()
    assert (np.asarray(decode(whole + b"trailing")) == PIXELS).all()


def directory_entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack("<HHI", tag, kind, count) + value


VERSION = directory_entry(0xB000, 7, 4, b"0100")
JPEG_SEGMENTS = {
    "MPF without a count": segment(0xE2, mpf(VERSION)),
    "MPF without entries": segment(0xE2, mpf(VERSION, directory_entry(0xB001, 4, 1, struct.pack("<I", 2)))),
    "MPF with a wrong type": segment(0xE2, mpf(VERSION, directory_entry(0xB001, 2, 3, b"ab\0\0"))),
    "MPF cut": segment(0xE2, b"MPF\0II*\0\xff\xff\0\0"),
    "MPF empty": segment(0xE2, b"MPF\0"),
    "Photoshop cut": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10\0"),
    "Photoshop shorter": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
    "a profile of no part": segment(0xE2, b"ICC_PROFILE\0\0\0abc"),
    "a profile without numbers": segment(0xE2, b"ICC_PROFILE\0"),
    "Adobe, short": segment(0xEE, b"Adobe\0"),
    "JFIF, short": segment(0xE0, b"JFIF\0\1"),
    "EXIF, empty": segment(0xE1, b"Exif\0\0"),
    "EXIF, unterminated": segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
    "a comment that is no text": segment(0xFE, b"\xff\xfe\xfd"),
    "a comment that looks like a scan": segment(0xFE, b"\xff\xda\0\x0c\x03"),
    "length 1": b"\xff\xe5\0\1",
    "length 0": b"\xff\xe5\0\0",
    "fill bytes": b"\xff" * 1000,
    "bytes between": b"\0\0",
    "many": segment(0xEB, bytes(60_000)) * 100,
    "XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
    **{f"APP{i}, empty": segment(0xE0 + i, b"") for i in range(16)},
}


@pytest.mark.parametrize("name", JPEG_SEGMENTS)
def test_jpeg_segments_that_are_not_used(name):
    expected = np.asarray(decode(JPEG))
    first = JPEG.index(b"\xff\xdb")  # behind the JFIF segment
    for at in (2, first):
        data = JPEG[:at] + JPEG_SEGMENTS[name] + JPEG[at:]
        assert (np.asarray(decode(data)) == expected).all()
        assert (np.asarray(EncodedImage(data).decode_box((3, 0, 20, 15))) == expected[:15, 3:20]).all()


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_segments_that_tell_the_colour_space_are_used(mode):
    """Without the Adobe segment these would be YCbCr and not inverted."""
    data = encoded(IMAGE.convert(mode), "JPEG", quality=95, keep_rgb=True)
    found = np.asarray(decode(data)).astype(int)
    assert np.abs(found - np.asarray(IMAGE.convert(mode).convert("RGB"))).mean() < 4


WEBP = encoded(IMAGE, "WEBP", lossless=True)[12:]
VP8L = (WEBP[:4], WEBP[8 : 8 + int.from_bytes(WEBP[4:8], "little")])
VP8X = (b"VP8X", bytes((0x2C, 0, 0, 0)) + struct.pack("<I", 55)[:3] + struct.pack("<I", 39)[:3])
"""A header that promises a profile, EXIF and XMP."""
WEBPS = {
    "nothing of what is promised": riff(VP8X, VP8L),
    "rubbish": riff(VP8X, (b"ICCP", b"abc"), VP8L, (b"EXIF", b"garbage"), (b"XMP ", b"\xff" * 9)),
    "unknown chunks": riff(VP8X, (b"ABCD", b"x" * 11), VP8L, (b"EFGH", b"")),
    "in another order": riff(VP8X, (b"EXIF", b"x" * 11), VP8L, (b"ICCP", b"x")),
    "twice": riff(VP8X, VP8L, (b"EXIF", b"x" * 11), (b"EXIF", b"y" * 12)),
    "large": riff(VP8X, VP8L, (b"XMP ", bytes(5_000_000))),
    "after a simple one": riff(VP8L, (b"EXIF", b"x" * 11)),
    "cut": riff(VP8X, VP8L, (b"EXIF", b"x" * 111))[:-50],
    "a length beyond the end": riff(VP8X, VP8L) + b"EXIF\xff\xff\0\0xx",
    "trailing bytes": riff(VP8L) + b"junk" * 99,
}


@pytest.mark.parametrize("name", WEBPS)
def test_webp_chunks_that_are_not_used(name):
    assert (np.asarray(decode(WEBPS[name])) == PIXELS).all()


def test_every_reader_takes_them(tmp_path):
    path = tmp_path / "text.png"
    path.write_bytes(png(PIXELS, 8, 2, PNG_CHUNKS["many texts"]))
    assert (read_image(path).numpy() == PIXELS.transpose(2, 0, 1)).all()
    assert examine(Source(path, path.name, "text", 1), min_side=0).data == path.read_bytes()


@pytest.mark.parametrize("name", ["many texts", "a profile of 2 MB", "international text", "EXIF as text, a bomb"])
def test_nothing_is_unfolded(name):
    data = png(PIXELS, 8, 2, PNG_CHUNKS[name])
    assert peak(data) < 2 * len(data) + 1_500_000


def peak(data: bytes) -> int:
    """Bytes that Python's allocator hands out while an image is decoded."""
    tracemalloc.start()
    try:
        decode(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def with_exif(kind: str, exif: bytes) -> bytes:
    if kind == "JPEG":
        return JPEG[:2] + segment(0xE1, b"Exif\0\0" + exif) + JPEG[2:]
    return {
        "PNG": lambda: png(PIXELS, 8, 2, [chunk(b"eXIf", exif)]),
        "PNG, behind the pixels": lambda: png(PIXELS, 8, 2, after=[chunk(b"eXIf", exif)]),
        "PNG, as text": lambda: png(PIXELS, 8, 2, [chunk(b"tEXt", b"Raw profile type exif\0" + profile(exif))]),
        "PNG, as compressed text": lambda: png(
            PIXELS, 8, 2, after=[chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile(exif)))]
        ),
        "WEBP": lambda: riff(VP8X, VP8L, (b"EXIF", exif)),
        "WEBP with a prefix": lambda: riff(VP8X, VP8L, (b"EXIF", b"Exif\0\0" + exif)),
    }[kind]()


@pytest.mark.parametrize(
    "kind",
    ["JPEG", "PNG", "PNG, behind the pixels", "PNG, as text", "PNG, as compressed text", "WEBP", "WEBP with a prefix"],
)
def test_exif_turns_an_image_wherever_it_is(kind):
    upright, turned = np.asarray(decode(with_exif(kind, b""))), np.asarray(decode(with_exif(kind, SIDEWAYS)))
    assert (turned == np.rot90(upright, 3)).all()


def test_an_exif_chunk_counts_before_one_as_text():
    text = chunk(b"tEXt", b"Raw profile type exif\0" + profile(SIDEWAYS))
    for chunks in ([text, chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0")], [chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0"), text]):
        assert decode(png(PIXELS, 8, 2, chunks)).size == IMAGE.size


@pytest.mark.parametrize("exif", [b"", b"MM\0*\0\0\0\x08\0\0\0\0\0\0"], ids=["no EXIF", "EXIF of nothing"])
def test_xmp_never_turns_an_image(exif):
    jpeg = JPEG[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP) + JPEG[2:]
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
    webp = [VP8X, VP8L, (b"XMP ", XMP)]
    if exif:
        jpeg = jpeg[:2] + segment(0xE1, b"Exif\0\0" + exif) + jpeg[2:]
        webp.append((b"EXIF", exif))
    pngs = [png(PIXELS, 8, 2, [text, chunk(b"eXIf", exif)]), png(PIXELS, 8, 2, [chunk(b"eXIf", exif)], [text])]
    for data in (jpeg, riff(*webp), *pngs):
        assert EncodedImage(data).orientation == AS_STORED and decode(data).size == IMAGE.size


@settings(max_examples=60, deadline=None)
@given(
    orientation=st.integers(0, 12),
    endian=st.sampled_from("<>"),
    texts=st.dictionaries(st.sampled_from([0x010E, 0x010F, 0x0131, 0x013B]), st.text("abc", max_size=30)),
    kind=st.sampled_from([1, 3, 4]),
)
def test_the_orientation_is_found_among_other_tags(orientation, endian, texts, kind):
    exif = Image.Exif()
    exif.endian = endian
    for tag, text in texts.items():
        exif[tag] = text
    exif[0x0112] = orientation
    assert orientation_of(exif.tobytes()) == ORIENTATIONS.get(orientation, AS_STORED)
    number = {1: "BBH", 3: "HH", 4: "I"}[kind]
    entry = struct.pack(f"{endian}HHI{number}", 0x0112, kind, 1, *(orientation, 0, 0)[: len(number)])
    start = {"<": b"II*\0", ">": b"MM\0*"}[endian] + struct.pack(f"{endian}IH", 8, 1)
    assert orientation_of(start + entry + bytes(4)) == ORIENTATIONS.get(orientation, AS_STORED)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_exif_block_is_read_or_ignored(data):
    block = bytearray(SIDEWAYS + data.draw(st.binary(max_size=20)))
    for _ in range(data.draw(st.integers(0, 4))):
        block[data.draw(st.integers(0, len(block) - 1))] = data.draw(st.integers(0, 255))
    assert orientation_of(bytes(block[: data.draw(st.integers(0, len(block)))])) in (AS_STORED, *ORIENTATIONS.values())
