"""The layout of `.hpcm` files, to the byte, and a sentence for everything that can be wrong with one."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcm_scale.coding.container import HEADER_BYTES, MOST_PIXELS, Container, pack, unpack
from hpcm_scale.errors import UserError

CONTENT = Container(b"\x01\x23\x45\x67\x89\xab\xcd\xef", 768, 512, b"zzzz", b"yyyyyyyy", 0xFEDCBA98)

sides = st.integers(1, 2**32 - 1)
contents = st.builds(
    Container,
    digest=st.binary(min_size=8, max_size=8),
    width=sides,
    height=sides,
    z=st.binary(max_size=300),
    y=st.binary(max_size=300),
    symbols_checksum=st.integers(0, 2**32 - 1),
    level=st.none() | st.integers(0, 255),
).map(lambda content: replace(content, height=min(content.height, max(MOST_PIXELS // content.width, 1))))


def sealed(data: bytes) -> bytes:
    """The file with the checksum of its header, whatever that has become."""
    return data[:42] + struct.pack("<I", zlib.crc32(data[:42])) + data[46:]


def changed(offset: int, form: str, *values: int) -> bytes:
    """The file of CONTENT with other numbers at a place of its header, and the right checksum of that."""
    data = bytearray(pack(CONTENT))
    struct.pack_into(f"<{form}", data, offset, *values)
    return sealed(bytes(data))


def test_layout():
    data = pack(CONTENT)
    assert data[:6] == b"HPCM\x01\x01"
    assert data[6:14] == CONTENT.digest
    assert struct.unpack("<2I", data[14:22]) == (768, 512)
    assert struct.unpack("<2I", data[22:30]) == (4, zlib.crc32(b"zzzz"))
    assert struct.unpack("<2I", data[30:38]) == (8, zlib.crc32(b"yyyyyyyy"))
    assert struct.unpack("<2I", data[38:46]) == (0xFEDCBA98, zlib.crc32(data[:42]))
    assert data[46:] == b"zzzz" + b"yyyyyyyy"


@pytest.mark.parametrize("level", [0, 77, 255])
def test_a_level_follows_the_rest_of_the_header(level):
    data, without = pack(replace(CONTENT, level=level)), pack(CONTENT)
    assert data[:4] + data[5:42] == without[:4] + without[5:42]
    assert (data[4], data[42]) == (2, level)
    assert struct.unpack("<I", data[43:47]) == (zlib.crc32(data[:43]),)
    assert data[47:] == without[46:]


def test_overhead_is_under_64_bytes():
    for level, overhead in ((None, 46), (0, 47)):
        data = pack(replace(CONTENT, level=level))
        assert len(data) - len(CONTENT.z) - len(CONTENT.y) == overhead
    assert HEADER_BYTES == 46


@given(contents.filter(lambda content: content.width * content.height <= MOST_PIXELS))
def test_what_is_packed_is_unpacked(content):
    assert unpack(pack(content)) == content


@pytest.mark.parametrize(
    ("data", "code", "detail"),
    [
        (b"", "not-hpcm-file", ""),
        (b"HPC", "not-hpcm-file", ""),
        (b"\x89PNG" + bytes(100), "not-hpcm-file", ""),
        (b"HPCM", "truncated-header", "(4 bytes)"),
        (pack(CONTENT)[:45], "truncated-header", "(45 bytes)"),
        (changed(4, "B", 3), "file-version", "version is 3.1, but this hpcm_scale reads 1.1 and 2.1;"),
        (changed(5, "B", 9), "file-version", "version is 1.9,"),
        (pack(CONTENT)[:8] + b"?" + pack(CONTENT)[9:], "damaged-header", ""),
        (changed(14, "I", 0), "impossible-image-size", "0×512"),
        (changed(18, "I", 0), "impossible-image-size", "768×0"),
        (changed(14, "II", 2**14, 2**14 + 1), "impossible-image-size", "16384×16385"),
        (changed(14, "II", 2**32 - 1, 2**32 - 1), "impossible-image-size", "4294967295×4294967295"),
        (pack(CONTENT)[:-1], "file-length", "57 bytes instead of the 58"),
        (pack(CONTENT) + b"\0", "file-length", "59 bytes instead of the 58"),
        (changed(22, "I", 5), "file-length", "58 bytes instead of the 59"),
        (changed(30, "I", 2**32 - 1), "file-length", "58 bytes instead of the 4294967345"),
        (pack(CONTENT)[:46] + b"?" + pack(CONTENT)[47:], "damaged-stream", "stream of z"),
        (pack(CONTENT)[:-1] + b"?", "damaged-stream", "stream of y"),
        (changed(22, "IIII", 8, zlib.crc32(b"zzzzyyyy"), 4, 0), "damaged-stream", "stream of y"),
    ],
)
def test_every_refusal_names_the_mistake(data, code, detail):
    with pytest.raises(UserError) as refusal:
        unpack(data)
    assert refusal.value.code == code
    assert detail in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_largest_image_is_believed():
    assert unpack(changed(14, "II", 2**14, 2**14)).width == 2**14


@given(contents, st.data())
def test_no_flipped_bit_is_missed(content, draw):
    data = bytearray(pack(content))
    place = draw.draw(st.integers(0, 8 * len(data) - 1))
    data[place // 8] ^= 1 << place % 8
    with pytest.raises(UserError):
        unpack(bytes(data))


@given(contents, st.integers(0, 1000), st.binary(min_size=1, max_size=20))
def test_no_other_length_is_taken(content, length, more):
    data = pack(content)
    for wrong in (data[: length % len(data)], data + more):
        with pytest.raises(UserError):
            unpack(wrong)
