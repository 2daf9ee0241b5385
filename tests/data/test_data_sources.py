"""Which files of a folder are taken, what becomes of the others, and that the disk's order of listing is nobody's."""

from __future__ import annotations

import csv
import os
import random
import shutil
import socket
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from data_refusals import refused
from PIL import Image

from hpcm_scale.data.build import build_shards
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import UserError
from hpcm_scale.tracking.progress import progress


def build(*photos: Path, out: Path):
    return build_shards(photos, out, min_side=0, shard_size=10**6, workers=1, progress=progress)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def listing(monkeypatch) -> Callable[[int], None]:
    """`listing(seed)`: the disk lists folders in an order of its own."""
    scandir = os.scandir

    class Shuffled(list):
        def __enter__(self):
            return iter(self)

        def __exit__(self, *exception):
            pass

        def __next__(self):  # os.walk takes it for an iterator
            if not self:
                raise StopIteration
            return self.pop()

        def close(self):
            pass

    def shuffle(seed: int) -> None:
        def listed(path):
            with scandir(path) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
            random.Random(seed).shuffle(found)
            return Shuffled(found)

        monkeypatch.setattr(os, "scandir", listed)

    return shuffle


def test_a_set_does_not_depend_on_the_order_of_listing(listing, packaged_photos, tmp_path):
    photos = tmp_path / "photos"
    (photos / "sub" / "deep").mkdir(parents=True)
    shutil.copy(packaged_photos[5], photos / "real.jpg")
    shutil.copy(packaged_photos[0], photos / "sub" / "A.png")
    shutil.copy(packaged_photos[1], photos / "sub" / "a.PNG")
    shutil.copy(packaged_photos[2], photos / "sub" / "deep" / os.fsdecode(b"caf\xe9.png"))
    for link in ("a_link.jpg", "z_link.jpg", "sub/link.jpg"):
        (photos / link).symlink_to(photos / "real.jpg")
    os.link(photos / "real.jpg", photos / "hard.jpg")
    (photos / "again").symlink_to(photos / "sub")
    (photos / "sub" / "round").symlink_to(photos)
    (photos / "sub" / "deep" / "self").symlink_to("self")
    sets = []
    for seed in range(6):
        listing(seed)
        built = build(photos, photos / "sub", photos, photos / "real.jpg", out=tmp_path / f"set{seed}")
        sets.append((built.index.keys, built.index.digest, digests(tmp_path / f"set{seed}")))
    assert sets[0][0] == ["a_link", "again/A", "again/a", "again/deep/caf", "hard"]
    assert sets == sets[:1] * 6


@pytest.fixture
def odd_folder(packaged_photos, tmp_path) -> Path:
    """Two images, one of them known by its content alone, and all that is none."""
    folder = tmp_path / "odd"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    Image.new("RGB", (40, 30)).save(folder / "sub" / "b.jfif", format="JPEG")
    (folder / "notes.txt").write_text("no image")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "self").symlink_to("self")
    (folder / "self.png").symlink_to("self.png")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "sock.png"))
    return folder


def test_images_are_known_by_name_or_content_and_the_rest_is_reported(odd_folder, capsys):
    images = ImageSet(odd_folder)
    assert images.names == ["a.png", "sub/b.jfif"] and images.load(1).shape == (3, 30, 40)
    assert capsys.readouterr().err == (
        f"hpcm: {odd_folder}: skipped files that are not a JPEG, PNG or WebP image (7): gone.png (No such file or "
        "directory), notes.txt, pipe.png (a pipe), self (Too many levels of symbolic links), self.png (Too many levels "
        "of symbolic links), …\n"
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_needs_no_extension(kind, tmp_path, capsys):
    Image.new("RGB", (40, 30)).save(tmp_path / "image", format=kind)
    assert ImageSet(tmp_path).load(0).shape == (3, 30, 40) and capsys.readouterr().err == ""


def test_what_is_named_as_an_image_and_is_none_is_refused_by_name(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    images = ImageSet(tmp_path)
    assert images.names == ["._a.png", "a.png"]
    with refused("broken-image"):
        images.load(0)


def test_a_name_that_is_not_utf_8_is_shown_and_found(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    images = ImageSet(tmp_path)
    assert images.names == ["caf\\xe9.png"] and images.load(0).shape == (3, 30, 40)


def test_what_is_no_file_is_reported_and_passed_over(odd_folder, tmp_path):
    built = build(odd_folder, out=tmp_path / "set")
    assert built.index.keys == ["a", "sub/b"] and built.index.extensions == ["png", "jpg"]
    with built.report.open(encoding="utf-8", newline="") as handle:
        reasons = {Path(row["file"]).name: row["reason"] for row in csv.DictReader(handle)}
    looped = "cannot be read: Too many levels of symbolic links"
    assert reasons == {
        "gone.png": "cannot be read: No such file or directory",
        "notes.txt": "not a JPEG, PNG or WebP image",
        "pipe.png": "cannot be read: it is a pipe",
        "self": looped,
        "self.png": looped,
        "sock.png": "cannot be read: it is a socket",
        "zero.png": "cannot be read: it is a device",
    }


def test_a_link_to_itself_is_no_place_for_a_set(odd_folder, tmp_path):
    (tmp_path / "self").symlink_to("self")
    with refused("unwritable-shards", "--out"):
        build(odd_folder, out=tmp_path / "self")


def test_a_folder_that_cannot_be_read_is_reported(monkeypatch, odd_folder, tmp_path, capsys):
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)  # the superuser, who may run this, reads everything
    assert ImageSet(odd_folder).names == ["a.png"]
    built = build(odd_folder, out=tmp_path / "set")
    assert f"{odd_folder / 'sub'},cannot be read: it is an unreadable folder" in built.report.read_text()
    with refused("unreadable-folder"):
        ImageSet(odd_folder / "sub")


@pytest.mark.parametrize("name", ["m" * 251, "ü" * 125, os.fsdecode(b"\xe9" * 251)], ids=["ascii", "utf-8", "bytes"])
def test_long_and_odd_names_become_plain_keys(name, packaged_photos, tmp_path):
    (tmp_path / "photos").mkdir()
    shutil.copy(packaged_photos[5], tmp_path / "photos" / f"{name}.jpg")
    [key] = build(tmp_path / "photos", out=tmp_path / "set").index.keys
    assert key.isascii() and len(f"{key}.jpg") <= 100


@pytest.mark.parametrize("name", ["pipe.png", "zero.png", "sock.png", "self"])
def test_what_is_named_must_be_a_file(name, odd_folder, tmp_path):
    with pytest.raises(UserError, match=r"is a pipe|is a device|is a socket|symbolic links"):
        build(odd_folder / name, out=tmp_path / "set")
