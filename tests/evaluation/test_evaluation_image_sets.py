"""Named image sets: Kodak is one, folders that differ are refused by what differs."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
from PIL import Image

from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.bd_rate import SETS, check_set


@pytest.fixture
def kodak(image_folder, tmp_path):
    """A copy of the Kodak set to spoil."""
    return shutil.copytree(image_folder, tmp_path / "kodak")


def refusal(name: str, folder, code: str) -> str:
    with pytest.raises(UserError) as refused:
        check_set(name, ImageSet(folder))
    assert refused.value.code == code
    return str(refused.value)


def plain(path, width: int, height: int, **options) -> None:
    """A picture of one colour."""
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path, **options)


def test_counts():
    assert {name: named.count for name, named in SETS.items()} == {"kodak": 24, "clic-pro-valid": 41, "tecnick": 100}


def test_kodak_is_kodak_whatever_its_files_are_called(kodak):
    check_set("kodak", ImageSet(kodak))
    for number, file in enumerate(sorted(kodak.iterdir(), reverse=True)):
        file.rename(kodak / f"{number}.png")
    check_set("kodak", ImageSet(kodak))


def test_an_unknown_name_is_refused(kodak):
    assert "kodac; choose from kodak, clic-pro-valid, tecnick" in refusal("kodac", kodak, "unknown-set")


def test_a_wrong_count_is_refused(kodak, tmp_path):
    (tmp_path / "val").mkdir()
    for number in range(12):
        plain(tmp_path / "val" / f"{number}.png", 768, 512)
    code = "set-of-other-count"
    sentence = refusal("kodak", tmp_path / "val", code)
    assert "kodak has 24 images" in sentence and "val has 12; the complete set is at https://r0k.us" in sentence
    assert "tecnick has 100 images" in refusal("tecnick", kodak, code)
    assert "clic-pro-valid has 41 images" in refusal("clic-pro-valid", kodak, code)
    plain(kodak / "kodim25.png", 768, 512)
    assert "has 25" in refusal("kodak", kodak, code)


def test_a_wrong_size_is_refused(kodak):
    plain(kodak / "kodim04.png", 500, 700)
    assert "kodim04.png, 500×700 pixels" in refusal("kodak", kodak, "set-of-other-images")


def test_a_turned_image_is_refused(kodak):
    """Some copies of the set have all images lying."""
    image = Image.open(kodak / "kodim04.png").transpose(Image.Transpose.ROTATE_90)
    image.save(kodak / "kodim04.png")
    assert "19 of its images have 768×512 pixels, not 18" in refusal("kodak", kodak, "set-of-other-sizes")


def test_images_turned_by_exif_are_taken_upright(kodak):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    image = Image.open(kodak / "kodim04.png").transpose(Image.Transpose.ROTATE_90)
    (kodak / "kodim04.png").unlink()
    image.save(kodak / "kodim04.jpg", exif=exif)
    check_set("kodak", ImageSet(kodak))


def test_a_broken_image_is_refused(kodak):
    data = (kodak / "kodim07.png").read_bytes()
    (kodak / "kodim07.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="kodim07"):
        check_set("kodak", ImageSet(kodak))


@pytest.mark.launch
def test_clic_is_known_by_its_numbers_of_pixels(tmp_path):
    """They sum up to what the challenge's limits for the set say; one image of another size is found."""
    sizes = SETS["clic-pro-valid"].sizes
    pixels = sum(size * count for size, count in sizes.items())
    limits = {0.075: 857_362, 0.15: 1_714_724, 0.3: 3_429_448}  # bytes of the whole set, by bpp
    assert {bpp: math.ceil(bpp * pixels / 8) for bpp in limits} == limits
    for number, size in enumerate(sizes.elements()):
        plain(tmp_path / f"{number:02d}.png", size, 1, compress_level=1)
    check_set("clic-pro-valid", ImageSet(tmp_path))
    plain(tmp_path / "00.png", 1000, 700)
    assert "00.png, 1000×700 pixels" in refusal("clic-pro-valid", tmp_path, "set-of-other-images")
    plain(tmp_path / "00.png", 768, 256)  # as many as one of the set's, which then has two
    sentence = refusal("clic-pro-valid", tmp_path, "set-of-other-sizes")
    assert "2 of its images have 196,608 pixels, not 1" in sentence


@pytest.mark.launch
def test_tecnick_is_a_hundred_squares(tmp_path):
    plain(tmp_path / "000.png", 1200, 1200, compress_level=1)
    for number in range(1, 100):
        shutil.copy(tmp_path / "000.png", tmp_path / f"{number:03d}.png")
    check_set("tecnick", ImageSet(tmp_path))
    plain(tmp_path / "050.png", 600, 600)
    assert "050.png, 600×600 pixels" in refusal("tecnick", tmp_path, "set-of-other-images")
