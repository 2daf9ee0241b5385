"""Every kind of image becomes upright 8-bit RGB, and a broken one a reason."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from data_refusals import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import Decoded, encoded, png16
from PIL import Image

from hpcm_scale.data.build import examine
from hpcm_scale.data.images import MAX_PIXELS, cut, decode, to_array
from hpcm_scale.data.sources import ImageSet, Source, read_image


@pytest.fixture(scope="module")
def photo(packaged_photos) -> Image.Image:
    with Image.open(packaged_photos[1]) as image:  # chelsea: 451 × 300
        return image.convert("RGB")


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_lossless_rgb_is_untouched(photo):
    for data in (encoded(photo, "PNG"), encoded(photo, "WEBP", lossless=True)):
        assert (pixels(decode(data)) == pixels(photo)).all()


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_becomes_three_equal_channels(photo, mode):
    grey = photo.convert(mode)
    expected = np.asarray(grey.convert("L")).astype(int)
    assert (pixels(decode(encoded(grey, "PNG"))) == expected[..., None]).all()


def test_palette(photo):
    palette = photo.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    found = pixels(decode(encoded(palette, "PNG")))
    assert (found == pixels(palette.convert("RGB"))).all()
    assert np.abs(found - pixels(photo)).mean() < 6


def test_cmyk_jpeg_looks_like_the_image(photo):
    found = pixels(decode(encoded(photo.convert("CMYK"), "JPEG", quality=95)))
    assert np.abs(found - pixels(photo)).mean() < 4


def test_transparency_shows_white(photo):
    layer = photo.convert("RGBA")
    alpha = np.full((photo.height, photo.width), 255, np.uint8)
    alpha[:, :100], alpha[:, 100:200] = 0, 128
    layer.putalpha(Image.fromarray(alpha))
    original = pixels(photo)
    found = pixels(decode(encoded(layer, "PNG")))
    assert (found[:, :100] == 255).all()
    assert np.abs(found[:, 100:200] - (original[:, 100:200] + 255) / 2).max() <= 1.5
    assert (found[:, 200:] == original[:, 200:]).all()
    grey = pixels(decode(encoded(layer.convert("LA"), "PNG")))
    assert (grey[:, :100] == 255).all()
    assert (grey[:, 200:] == np.asarray(photo.convert("L")).astype(int)[:, 200:, None]).all()


def test_a_transparent_palette_entry_shows_white(photo):
    palette = photo.convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    found = pixels(decode(encoded(palette, "PNG", transparency=3)))
    assert (found[np.asarray(palette) == 3] == 255).all()


def test_sixteen_bits_keep_the_high_byte_in_grey_and_colour():
    grey = np.arange(65536).reshape(256, 256)
    found = pixels(decode(encoded(Image.fromarray(grey.astype(np.uint16)), "PNG")))
    assert (found == (grey >> 8)[..., None]).all()
    colour = np.random.default_rng(0).integers(0, 65536, (20, 30, 3))
    assert (pixels(decode(png16(colour, 2))) == colour >> 8).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("orientation", "quarter_turns"), [(1, 0), (6, 3), (3, 2), (8, 1)])
def test_exif_rotation_is_applied(photo, kind, orientation, quarter_turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = pixels(decode(encoded(photo, kind, exif=exif)))
    expected = np.rot90(pixels(photo), quarter_turns)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 8


def test_malformed_exif_counts_as_none(photo):
    assert decode(encoded(photo, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")).size == photo.size


def test_other_formats_and_rubbish_are_refused(photo):
    for data in (encoded(photo, "GIF"), encoded(photo, "TIFF"), b"", b"hello", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(ValueError, match="not a JPEG, PNG or WebP"):
            decode(data)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_of_twelve_bits_is_called_so(photo, progressive):
    data = encoded(photo, "JPEG", progressive=progressive)
    at = data.index(b"\xff\xc2" if progressive else b"\xff\xc0") + 4
    with pytest.raises(ValueError, match="JPEG files with 12 bits a sample are not supported"):
        decode(data[:at] + b"\x0c" + data[at + 1 :])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_broken(photo, kind):
    data = encoded(photo, kind)
    for part in (0.5, 0.9, 0.98):
        with pytest.raises(ValueError, match="broken image"):
            decode(data[: int(part * len(data))])


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = png16(np.zeros((1, 1), np.uint16), 0)
    return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]


@pytest.mark.parametrize("pillows_limit", [Image.MAX_IMAGE_PIXELS, None, 10**12])
@pytest.mark.parametrize("size", [(40_000, 40_000), (MAX_PIXELS + 1, 1), (13_100, 13_100), (65_000, 65_000)])
def test_a_decompression_bomb_is_refused_before_it_unfolds(monkeypatch, size, pillows_limit):
    """Whatever other libraries have made of Pillow's limit, which is the whole process's."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)
    with pytest.raises(ValueError, match=r"^too many pixels: more than 170,000,000$"):
        decode(bomb(*size))


def test_as_many_pixels_as_the_limit_are_no_bomb():
    with pytest.raises(ValueError, match="broken image"):  # there are no pixels in it
        decode(bomb(17_000, 10_000))


def test_a_bomb_is_refused_wherever_an_image_comes_in(tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb(40_000, 40_000))
    reason = "too many pixels: more than 170,000,000"
    assert examine(Source(tmp_path / "bomb.png", "bomb.png", "bomb", 1), min_side=0) == reason
    with refused("broken-image") as caught:
        read_image(tmp_path / "bomb.png")
    assert reason in str(caught.value)
    with refused("broken-image"):
        ImageSet(tmp_path).load(0)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "WEBP"]))
def test_any_damage_gives_an_image_or_a_value_error(data, kind):
    grain = np.random.default_rng(1).integers(0, 256, (17, 23, 3), np.uint8)
    file = bytearray(encoded(Image.fromarray(grain), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ValueError):
        assert decode(bytes(file)).mode == "RGB"


def test_crops_are_pieces_of_the_image_at_all_places(photo):
    original = pixels(photo)
    lefts, tops, mirrored = set(), set(), 0
    for sample in range(200):
        square, upscaled = cut(Decoded(photo), 290, False, seed=3, epoch=1, sample=sample)
        turned, _ = cut(Decoded(photo), 290, True, seed=3, epoch=1, sample=sample)
        assert not upscaled and square.size == (290, 290)
        found = pixels(square)
        assert (pixels(turned) == found).all() or (pixels(turned) == found[:, ::-1]).all()
        mirrored += (pixels(turned) != found).any()
        windows = np.lib.stride_tricks.sliding_window_view(original[..., 0], (290, 290))[:, :, 0, :8]
        top, left = np.argwhere((windows == found[0, :8, 0]).all(-1))[0]
        assert (original[top : top + 290, left : left + 290] == found).all()
        tops.add(top), lefts.add(left)
    assert tops == set(range(11))
    assert min(lefts) < 10 and max(lefts) > 150
    assert 70 < mirrored < 130


def test_a_small_image_is_scaled_up_not_stretched(photo):
    small = photo.resize((60, 40), Image.Resampling.LANCZOS)
    square, upscaled = cut(Decoded(small), 128, False, seed=0, epoch=0, sample=0)
    assert upscaled and square.size == (128, 128)
    whole = pixels(small.resize((192, 128), Image.Resampling.LANCZOS))
    errors = [np.abs(whole[:, left : left + 128] - pixels(square)).mean() for left in range(65)]
    assert min(errors) < 4 < 30 < max(errors)  # the edges differ a little: the square was cut first


def test_a_sliver_does_not_unfold_to_a_giant():
    square, upscaled = cut(Decoded(Image.new("RGB", (1, 20_000))), 256, True, seed=0, epoch=0, sample=0)
    assert upscaled and square.size == (256, 256)


def test_arrays_are_channels_first(photo):
    array = to_array(photo)
    assert array.shape == (3, 300, 451) and array.dtype == np.uint8 and array.flags.c_contiguous
    assert (array.transpose(1, 2, 0) == pixels(photo)).all()
