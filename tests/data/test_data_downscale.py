"""JPEG photos are scaled down by a random factor before the crop: as far as asked, as far as they are large."""

from __future__ import annotations

import numpy as np
import pytest
from crops import assert_same, seen
from hypothesis import given
from hypothesis import strategies as st
from image_files import Decoded, encoded
from PIL import Image
from scipy.stats import kstest

from hpcm_scale.config.checks import check
from hpcm_scale.config.compose import compose
from hpcm_scale.data.images import EncodedImage, cut, decode, place
from hpcm_scale.data.index import load_index
from hpcm_scale.errors import UserError


@pytest.fixture(scope="module")
def photo(packaged_photos) -> Image.Image:
    with Image.open(packaged_photos[1]) as image:
        return image.convert("RGB")


def jpeg(photo: Image.Image, orientation: int = 1, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photo, "JPEG", exif=exif, **({"quality": 90} | options))


@given(
    size=st.tuples(st.integers(1, 900), st.integers(1, 900)),
    crop=st.integers(1, 300),
    downscale=st.floats(0.01, 1),
    epoch=st.integers(0, 99),
    sample=st.integers(0, 10**6),
)
def test_the_square_lies_in_the_image_and_is_never_too_small_or_large(size, crop, downscale, epoch, sample):
    where = {"seed": 1, "epoch": epoch, "sample": sample}
    box, side, mirrored = place(size, crop, True, downscale=downscale, **where)
    assert box[2] - box[0] == box[3] - box[1] == side and min(box) >= 0 and box[2] <= size[0] and box[3] <= size[1]
    if min(size) <= crop:
        assert side == min(size)
    else:
        assert crop <= side <= min(round(crop / downscale), *size)
    assert mirrored == place(size, crop, True, **where).mirrored
    assert place(size, crop, True, **where).side == min(crop, *size)


def test_crops_that_are_not_scaled_are_those_of_ever():
    found = [place((300, 200), 64, True, seed=1, epoch=2, sample=sample) for sample in range(3)]
    assert found == [((1, 87, 65, 151), 64, True), ((88, 81, 152, 145), 64, True), ((142, 29, 206, 93), 64, True)]


@pytest.mark.parametrize(("size", "least"), [((4000, 3000), 0.25), ((512, 640), 0.5)])
def test_factors_are_uniform_over_what_the_image_allows(size, least):
    sides = [place(size, 256, False, seed=0, epoch=0, sample=n, downscale=0.25).side for n in range(4000)]
    assert min(sides) == 256 and max(sides) == 256 / least
    assert kstest(256 / np.array(sides), "uniform", (least, 1 - least)).pvalue > 0.01


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}], ids=str)
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_crops_of_files_are_those_of_images_that_were_scaled(photo, options, orientation):
    """To the bit those of decoded photos; and but for rounding those of Pillow's Lanczos over all of a photo."""
    data = jpeg(photo, orientation, **options)
    whole = decode(data)
    scaled = 0
    for sample in range(20):
        where = {"seed": 1, "epoch": 2, "sample": sample, "downscale": 0.3}
        square, upscaled = cut(EncodedImage(data), 64, False, **where)
        assert not upscaled and square.size == (64, 64)
        assert (np.asarray(square) == np.asarray(cut(Decoded(whole), 64, False, **where)[0])).all()
        box, side, _ = place(whole.size, 64, False, **where)
        expected = whole.resize((64, 64), Image.Resampling.LANCZOS, box=box)
        assert np.abs(np.asarray(square, np.int16) - np.asarray(expected)).max() <= 1
        scaled += side > 64
    assert scaled > 15


def test_a_square_at_the_top_needs_no_more_than_the_top_of_the_file(photo):
    data = jpeg(photo)
    tops = []
    for sample in range(60):
        where = {"seed": 0, "epoch": 0, "sample": sample, "downscale": 0.5}
        box, side, _ = place(photo.size, 64, False, **where)
        if side > 64 and box[3] < photo.height // 3:
            top = cut(EncodedImage(data[: len(data) * 2 // 3]), 64, False, **where)[0]
            tops.append((np.asarray(top) == np.asarray(cut(Decoded(decode(data)), 64, False, **where)[0])).all())
    assert len(tops) > 2 and all(tops)


def test_less_is_left_of_what_jpeg_has_done(photo):
    """Against the same crop of the photo that the file was made from."""
    data = jpeg(photo, quality=30)

    def error(downscale: float) -> float:
        found = []
        for sample in range(30):
            where = {"seed": 0, "epoch": 0, "sample": sample, "downscale": downscale}
            pair = [
                np.asarray(cut(image, 64, False, **where)[0], float) for image in (EncodedImage(data), Decoded(photo))
            ]
            found.append(((pair[0] - pair[1]) ** 2).mean())
        return float(np.mean(found))

    assert error(0.25) < 0.8 * error(1.0)


def test_of_a_set_only_the_jpegs_are_scaled(small_set):
    """Whatever the workers; what is scaled up is scaled up as before."""
    plain, scaled = seen(small_set, last=92), seen(small_set, last=92, downscale=0.4)
    assert plain.keys == scaled.keys
    index = load_index(str(small_set))
    kinds = dict(zip(index.keys, index.extensions, strict=True))
    assert set(kinds.values()) == {"jpg", "jpeg", "png", "webp"}
    same = {image: bool((plain.crops[image] == scaled.crops[image]).all()) for image in plain.keys}
    assert all(same[image] for image, key in plain.keys.items() if kinds[key][0] != "j")
    jpegs = [same[image] for image, key in plain.keys.items() if kinds[key][0] == "j"]
    assert jpegs.count(False) > 0.9 * len(jpegs)
    assert_same(scaled, seen(small_set, last=92, downscale=0.4, workers=2, processes=2))


@pytest.mark.parametrize("factor", ["0", "-0.5", "1.01", "nan", "inf"])
def test_a_factor_that_is_none_is_refused(factor):
    with pytest.raises(UserError, match=r"^data\.downscale=\S+ must be greater than 0 and at most 1$"):
        check(compose(["model=nano", f"data.downscale={factor}"]), 1)
