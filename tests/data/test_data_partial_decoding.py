"""A crop is decoded no further than it needs, and has the pixels that it has in the whole image."""

from __future__ import annotations

from io import BytesIO
from itertools import product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from image_files import Decoded, encoded, first_scans, png16, scan_by_scan, scans
from PIL import Image, ImageOps

from hpcm_scale.data.images import EncodedImage, cut, decode
from hpcm_scale.data.jpeg import shortened

ORIENTATION = 0x0112
JPEGS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "progressive 4:4:4": {"progressive": True, "subsampling": 0},
    "restart markers": {"restart_marker_blocks": 7},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "comment": {"comment": b"\xff\xc0 that looks like a frame"},
}


@pytest.fixture(scope="module")
def photo(packaged_photos) -> Image.Image:
    with Image.open(packaged_photos[1]) as image:
        return image.convert("RGB").crop((100, 40, 331, 229))


def jpeg(photo: Image.Image, kind: str, orientation: int = 1) -> bytes:
    options = dict(JPEGS[kind])
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(photo.convert(options.pop("mode", "RGB")), "JPEG", quality=90, exif=exif, **options)


def pillow(data: bytes) -> Image.Image:
    """Whole and upright, by Pillow alone."""
    with Image.open(BytesIO(data)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def boxes(width: int, height: int, number: int) -> list[tuple[int, int, int, int]]:
    """Those in the corners, and random ones."""
    found = [(0, 0, 40, 40), (width - 40, 0, width, 40), (0, height - 40, 40, height)]
    generator = np.random.default_rng(width)
    for _ in range(number):
        side = int(generator.integers(1, min(width, height) + 1))
        left, top = int(generator.integers(width - side + 1)), int(generator.integers(height - side + 1))
        found.append((left, top, left + side, top + side))
    return found


def assert_same_boxes(data: bytes, whole: Image.Image, number: int = 12) -> None:
    assert EncodedImage(data).size == whole.size
    for box in boxes(*whole.size, number):
        assert (np.asarray(EncodedImage(data).decode_box(box)) == np.asarray(whole.crop(box))).all(), box


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", JPEGS)
def test_any_box_of_any_jpeg_has_the_pixels_of_the_whole(photo, kind, orientation):
    data = jpeg(photo, kind, orientation)
    assert_same_boxes(data, pillow(data))


@pytest.mark.parametrize("restarts", [0, 5])
@pytest.mark.parametrize("quality", [30, 90])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_progressive_files_without_their_last_scans(photo, subsampling, quality, restarts):
    """libjpeg smooths blocks whose coefficients it does not know by those two rows further."""
    options = {"quality": quality, "subsampling": subsampling, "restart_marker_blocks": restarts}
    data = encoded(photo, "JPEG", progressive=True, **options)
    for number in range(1, len(scans(data))):
        part = first_scans(data, number)
        assert_same_boxes(part, pillow(part), number=25)


def test_progressive_files_whose_restart_markers_are_not_where_they_should_be(photo):
    """libjpeg smooths differently above and below the row where coded data is found again."""
    part = photo.crop((0, 0, 50, 120))
    for quality, subsampling in product((50, 80), (0, 2)):
        options = {"quality": quality, "restart_marker_blocks": 5, "subsampling": subsampling}
        data = encoded(part, "JPEG", progressive=True, **options)
        for number, interval in product((1, 3, 5), (4, 23, 37, 61)):
            damaged = first_scans(data, number).replace(b"\xff\xdd\0\4\0\5", b"\xff\xdd\0\4\0" + bytes((interval,)))
            assert_same_boxes(damaged, pillow(damaged))


def patched(data: bytes, frame: int | None = None, sampling: int | None = None) -> bytes:
    """A JPEG whose frame has another marker, or whose first component is sampled in another way."""
    at = max(data.find(marker) for marker in (b"\xff\xc0", b"\xff\xc2"))
    header = bytearray(data[at : at + 19])
    header[1] = frame or header[1]
    header[11] = sampling or header[11]
    return data[:at] + bytes(header) + data[at + 19 :]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    ("subsampling", "sampling"),
    [(1, 0x12), (2, 0x41), (2, 0x14), (0, 0x11), (1, 0x21)],
    ids=["4:4:0", "4:1:1", "4:1:0 upright", "4:4:4", "4:2:2"],
)
def test_every_subsampling(photo, subsampling, sampling, progressive):
    """Files with as many blocks in each unit: the image is another, of as much coded data."""
    square = photo.resize((192, 192))
    for side in (192, 187):
        data = encoded(square.crop((0, 0, side, side)), "JPEG", subsampling=subsampling, progressive=progressive)
        data = patched(data, sampling=sampling)
        assert_same_boxes(data, pillow(data), number=25)
        for number in range(1, len(scans(data))):
            part = first_scans(data, number)
            assert_same_boxes(part, pillow(part), number=10)


def test_a_scan_for_each_component(photo):
    data = scan_by_scan(photo)
    assert len(scans(data)) == 3
    assert_same_boxes(data, pillow(data), number=25)


def test_arithmetic_coding(photo):
    """Which takes any data for an image."""
    data = patched(encoded(photo, "JPEG"), frame=0xC9)
    assert_same_boxes(data, pillow(data))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "MPO"])
def test_other_kinds(photo, kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    more = {"save_all": True, "append_images": [photo.rotate(180)]} if kind == "MPO" else {}
    data = encoded(photo, kind, exif=exif, **more)
    assert_same_boxes(data, pillow(data))


def test_the_rule_for_every_kind_of_pixel_holds_in_boxes(photo):
    layer = photo.convert("RGBA")
    layer.putalpha(photo.convert("L"))
    palette = photo.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    files = [encoded(image, "PNG") for image in (layer, layer.convert("LA"), photo.convert("1"), palette)]
    files.append(encoded(palette, "PNG", transparency=3))
    files.append(encoded(Image.fromarray(np.arange(60_000, dtype=np.uint16).reshape(200, 300)), "PNG"))
    files.append(png16(np.random.default_rng(0).integers(0, 65536, (70, 90, 3)), 2))
    for data in files:
        assert_same_boxes(data, decode(data))


@pytest.mark.parametrize("kind", JPEGS)
def test_rows_below_are_not_decoded(photo, kind):
    data = jpeg(photo, kind)
    for rows in (1, 16, 40, 100):
        with Image.open(BytesIO(shortened(data, rows))) as image:
            more = 31 + 32 * ("progressive" in kind)
            assert rows <= image.height <= rows + more < photo.height and image.width == photo.width
    assert shortened(data, photo.height - 3) is data


def test_a_box_at_the_top_needs_no_more_than_the_top_of_the_file(photo):
    """What lies below is not even looked at: it may be missing."""
    data = jpeg(photo, "4:2:0")
    top = EncodedImage(data[: len(data) * 2 // 3]).decode_box((5, 0, 45, 40))
    assert (np.asarray(top) == np.asarray(pillow(data).crop((5, 0, 45, 40)))).all()
    with pytest.raises(ValueError, match="broken image: image file is truncated"):
        EncodedImage(data[: len(data) * 2 // 3]).decode_box((5, 140, 45, 180))


def test_what_cannot_be_shortened_stays_as_it_is(photo):
    baseline = jpeg(photo, "4:2:0")
    frame = baseline.index(b"\xff\xc0")
    arithmetic = baseline[: frame + 1] + b"\xc9" + baseline[frame + 2 :]
    without_height = baseline[: frame + 5] + b"\0\0" + baseline[frame + 7 :]
    without_components = baseline[: frame + 9] + b"\0" + baseline[frame + 10 :]
    for data in (arithmetic, without_height, without_components, baseline[: frame + 6], b"", b"\xff", b"\xff\xd8\xff"):
        assert shortened(data, 8) is data
    assert shortened(encoded(photo, "PNG"), 8) == encoded(photo, "PNG")


def test_fill_bytes_before_a_marker(photo):
    data = jpeg(photo, "4:2:0")
    frame = data.index(b"\xff\xc0")
    filled = data[:frame] + b"\xff\xff\xff" + data[frame:]
    assert shortened(filled, 8) != filled
    assert_same_boxes(filled, pillow(data))


@pytest.mark.parametrize("crop", [64, 300])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_crops_of_files_are_those_of_decoded_images(photo, crop, orientation):
    """Small photos, which are scaled up, too."""
    data = jpeg(photo, "4:2:0", orientation)
    for sample in range(20):
        place = {"seed": 1, "epoch": 2, "sample": sample}
        square, upscaled = cut(EncodedImage(data), crop, True, **place)
        expected, as_expected = cut(Decoded(decode(data)), crop, True, **place)
        assert upscaled == as_expected == (crop == 300)
        assert (np.asarray(square) == np.asarray(expected)).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(JPEGS)))
def test_whatever_decodes_wholly_decodes_in_part_to_the_same(data, kind):
    """Damage done before a photo was stored, its EXIF block included."""
    grain = np.random.default_rng(1).integers(0, 256, (90, 50, 3), np.uint8)
    file = bytearray(jpeg(Image.fromarray(grain), kind, data.draw(st.integers(0, 9))))
    for _ in range(data.draw(st.integers(1, 3))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        whole = decode(bytes(file))
    except ValueError:
        assume(False)
    assume(min(whole.size) >= 40 and whole.width * whole.height < 10**6)
    assert_same_boxes(bytes(file), whole, number=2)
