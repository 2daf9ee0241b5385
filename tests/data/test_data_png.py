"""Every kind of PNG becomes what the specification says, transparency in the file's own bit depth included."""

from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import SAMPLES, chunk, png

from hpcm_scale.data.images import EncodedImage, TransparentImage, decode

KINDS = [(0, depth) for depth in (1, 2, 4, 8, 16)]
KINDS += [(2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8), (4, 8), (4, 16), (6, 8), (6, 16)]
"""The 15 legal pairs of colour type and bit depth."""
GREY, RGB, PALETTE = 0, 2, 3


def as_specified(
    samples: np.ndarray, depth: int, color_type: int, palette: bytes, transparency: bytes | None
) -> tuple[np.ndarray, np.ndarray]:
    """Colour (H, W, 3) and alpha (H, W) of 8 bits, by section 13 of the PNG specification; of 16 bits the high byte."""

    def eight_bits(values):
        return values >> 8 if depth == 16 else values * 255 // (2**depth - 1)

    height, width = samples.shape[:2]
    samples = samples.reshape(height, width, -1).astype(int)
    alpha = np.full((height, width), 255)
    if color_type == PALETTE:
        colours = np.zeros((256, 3), int)
        colours[: len(palette) // 3] = np.frombuffer(palette, np.uint8).reshape(-1, 3)
        alphas = np.full(256, 255)
        if transparency is not None:
            alphas[: len(transparency)] = list(transparency)
        return colours[samples[..., 0]], alphas[samples[..., 0]]
    if color_type in (4, 6):
        return np.broadcast_to(eight_bits(samples[..., :-1]), (height, width, 3)), eight_bits(samples[..., -1])
    if transparency is not None:
        key = np.frombuffer(transparency, ">u2").astype(int) & (2**depth - 1)
        alpha[(samples == key).all(-1)] = 0
    return np.broadcast_to(eight_bits(samples), (height, width, 3)), alpha


def assert_as_specified(
    samples: np.ndarray,
    depth: int,
    color_type: int,
    transparency: bytes | None,
    palette: bytes = b"",
    interlaced: bool = False,
) -> None:
    before = [chunk(b"PLTE", palette)] if palette else []
    before += [chunk(b"tRNS", transparency)] if transparency is not None else []
    data = png(samples, depth, color_type, before, interlaced=interlaced)
    colour, alpha = as_specified(samples, depth, color_type, palette, transparency)
    expected = (colour * alpha[..., None] + 255 * (255 - alpha[..., None])) / 255
    found = np.asarray(decode(data)).astype(int)
    assert np.abs(found - expected).max() < (1e-9 if np.isin(alpha, (0, 255)).all() else 1.01)
    height, width = alpha.shape
    box = (width // 3, height // 3, width, height)
    assert (np.asarray(EncodedImage(data).decode_box(box)) == found[height // 3 :, width // 3 :]).all()
    if (alpha < 255).any():
        with pytest.raises(TransparentImage):
            decode(data, background=None)
    else:
        assert (np.asarray(decode(data, background=None)) == colour).all()


def random_samples(color_type: int, depth: int, height: int = 13, width: int = 19) -> np.ndarray:
    shape = (height, width, SAMPLES[color_type])
    return np.random.default_rng(depth + color_type).integers(0, 2**depth, shape)


@pytest.mark.parametrize("interlaced", [False, True], ids=["", "interlaced"])
@pytest.mark.parametrize(("color_type", "depth"), KINDS)
def test_without_transparency(color_type, depth, interlaced):
    palette = bytes(range(3, 3 + 3 * min(2**depth, 80))) if color_type == PALETTE else b""
    assert_as_specified(random_samples(color_type, depth), depth, color_type, None, palette, interlaced)


@pytest.mark.parametrize("interlaced", [False, True], ids=["", "interlaced"])
@pytest.mark.parametrize("matches", [False, True], ids=["no pixel", "a pixel"])
@pytest.mark.parametrize("above", [0, 1], ids=["", "bits above"])
@pytest.mark.parametrize(("color_type", "depth"), [kind for kind in KINDS if kind[0] in (GREY, RGB)])
def test_a_transparent_colour(color_type, depth, above, matches, interlaced):
    """Bits above those of a sample count for nothing, and in 16 bits those below the 8 that are kept count."""
    samples = random_samples(color_type, depth)
    for key in (0, 1, 2**depth - 1, 2**depth // 3):
        pixel = np.array([key, *(key ^ 1, key)][: samples.shape[-1]])
        samples[(samples == pixel).all(-1)] = pixel ^ 1
        samples[5, 7:9] = pixel ^ 1  # as near as can be
        if matches:
            samples[4, 2:6] = pixel
        bits_above = above * (0xFFFF << depth) & 0xFFFF
        transparency = (pixel | bits_above).astype(">u2").tobytes()
        assert_as_specified(samples, depth, color_type, transparency, interlaced=interlaced)


@pytest.mark.parametrize("interlaced", [False, True], ids=["", "interlaced"])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "transparency", [b"", b"\0", b"\xff", b"\xff\0", b"\0\0", b"\x80", b"\xff\x80", b"\x01" * 200 + b"\xff" * 56]
)
def test_a_palette_with_transparency(transparency, depth, interlaced):
    """Shorter and longer than the palette."""
    palette = bytes(range(200, 200 + 6)) * min(2**depth // 2, 90)
    samples = random_samples(PALETTE, depth) % (len(palette) // 3)
    assert_as_specified(samples, depth, PALETTE, transparency, palette, interlaced)
    assert_as_specified(np.full_like(samples, 1), depth, PALETTE, transparency, palette, interlaced)


@pytest.mark.parametrize("transparency", [None, b"\0", b"\x80\xff"])
@pytest.mark.parametrize("depth", [2, 4, 8])
def test_samples_beyond_the_palette_are_black(depth, transparency):
    assert_as_specified(random_samples(PALETTE, depth), depth, PALETTE, transparency, bytes(range(50, 59)))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from([kind for kind in KINDS if kind[0] in (GREY, RGB, PALETTE)]))
def test_any_samples_and_any_transparency(data, kind):
    color_type, depth = kind
    height, width, few = (data.draw(st.integers(1, 9)) for _ in range(3))
    seed = data.draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 2**depth, (few, SAMPLES[color_type]))
    samples = values[generator.integers(0, few, (height, width))]
    palette = b""
    if color_type == PALETTE:
        palette = generator.bytes(3 * data.draw(st.integers(1, 2**depth)))
        transparency = data.draw(st.none() | st.binary(max_size=256))
    else:
        transparency = values[0].astype(">u2").tobytes() if data.draw(st.booleans()) else generator.bytes(6)
        transparency = transparency[: 2 * SAMPLES[color_type]]
    assert_as_specified(samples, depth, color_type, transparency, palette, data.draw(st.booleans()))


@pytest.mark.parametrize("color_type", [4, 6])
def test_a_transparent_colour_beside_an_alpha_channel_is_ignored(color_type):
    samples = random_samples(color_type, 8)
    data = png(samples, 8, color_type, [chunk(b"tRNS", samples[0, 0].astype(">u2").tobytes())])
    assert (np.asarray(decode(data)) == np.asarray(decode(png(samples, 8, color_type)))).all()


def test_a_transparent_colour_of_a_large_image_takes_no_more_memory_than_a_few_copies():
    samples = random_samples(RGB, 16, 700, 900)
    data = png(samples, 16, RGB, [chunk(b"tRNS", bytes(6))])
    tracemalloc.start()
    try:
        decode(data)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(data) + 20 * 700 * 900
    finally:
        tracemalloc.stop()


def test_broken_chunks_that_are_used_refuse_an_image():
    samples = random_samples(PALETTE, 4)
    palette, transparency = chunk(b"PLTE", bytes(48)), chunk(b"tRNS", b"\0\0")
    data = png(samples, 4, PALETTE, [palette, transparency])
    decode(data)
    for kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
        content = data.index(kind) + 4
        for at in (content, content - 8 + 8 + int.from_bytes(data[content - 8 : content - 4], "big")):
            broken = bytearray(data)
            broken[at] ^= 1  # in the content, and in the checksum
            with pytest.raises(ValueError, match=rf"^broken image: its {kind.decode()} chunk is damaged$"):
                decode(bytes(broken))


@pytest.mark.parametrize(
    ("color_type", "before", "reason"),
    [
        (3, [], "it has no palette"),
        (0, [chunk(b"tRNS", b"\0")], "its tRNS chunk is too short"),
        (2, [chunk(b"tRNS", b"\0" * 5)], "its tRNS chunk is too short"),
    ],
)
def test_what_is_missing_is_said(color_type, before, reason):
    with pytest.raises(ValueError, match=f"^broken image: {reason}$"):
        decode(png(random_samples(color_type, 8), 8, color_type, before))
    assert decode(png(random_samples(RGB, 8), 8, RGB)).size == (19, 13)


@pytest.mark.parametrize("interlaced", [False, True], ids=["", "interlaced"])
@pytest.mark.parametrize(("color_type", "depth"), KINDS)
def test_coded_data_that_ends_early_refuses_an_image(color_type, depth, interlaced):
    """Decoders leave the rest black. Of every size, and with data beyond the last row, it is whole."""
    before = [chunk(b"PLTE", bytes(3))] if color_type == PALETTE else []
    for height, width in ((1, 1), (2, 3), (5, 1), (1, 7), (9, 17)):
        data = png(random_samples(color_type, depth, height, width), depth, color_type, before, interlaced=interlaced)
        start, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
        parts, at = [], start
        while at < end:
            length = int.from_bytes(data[at : at + 4], "big")
            parts.append(data[at + 8 : at + 8 + length])
            at += 12 + length
        pixels = zlib.decompress(b"".join(parts))
        for coded in (pixels, pixels + b"more"):
            decode(data[:start] + chunk(b"IDAT", zlib.compress(coded)) + chunk(b"IEND", b""))
        for coded in (pixels[:-1], b"" if interlaced else pixels[: -len(pixels) // height], b""):
            with pytest.raises(ValueError, match=r"^broken image: image file is truncated"):
                decode(data[:start] + chunk(b"IDAT", zlib.compress(coded)) + chunk(b"IEND", b""))


def test_an_animation_shows_its_default_image():
    samples = random_samples(RGB, 8)
    frame = b"\0\0\0\0" + b"\0\0\0\5\0\0\0\5" + bytes(8) + b"\0\1\0\1\0\0"
    control = chunk(b"acTL", b"\0\0\0\2\0\0\0\0")
    moved = [chunk(b"fcTL", frame), chunk(b"fdAT", b"\0\0\0\1" + zlib.compress(bytes(80)))]
    for before in ([control], [control, chunk(b"fcTL", b"rubbish")]):
        found = np.asarray(decode(png(samples, 8, RGB, before, moved)))
        assert (found == samples).all()
