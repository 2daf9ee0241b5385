"""Shards hold the photos byte for byte, and an interrupted build goes on to the same bytes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import psutil
import pytest
import webdataset as wds
from data_refusals import refused
from drawn_images import drawn_image
from PIL import Image

from hpcm_scale.data.build import build_shards
from hpcm_scale.data.index import COLUMNS, load_index
from hpcm_scale.data.sources import unique_key
from hpcm_scale.tracking.progress import progress


def build(photos, out, **options):
    defaults = {"min_side": 0, "shard_size": 60_000, "workers": 2, "progress": progress}
    return build_shards(photos, out, **(defaults | options))


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_index_and_tars_hold_the_originals(photo_folder, small_set):
    index = load_index(str(small_set))
    originals = sorted(path for path in photo_folder.rglob("*") if path.is_file())
    assert len(index) == len(originals) == 23
    assert len(set(index.keys)) == 23
    assert len(index.shards) > 3
    assert index.keys[0] == "a/d0/piece_00" and index.extensions[:2] == ["jpg", "webp"]
    for sample, original in enumerate(originals):
        with (small_set / index.shards[index.shard[sample]].name).open("rb") as handle:
            handle.seek(index.offset[sample])
            assert handle.read(index.length[sample]) == original.read_bytes()
        with Image.open(original) as image:
            assert (index.width[sample], index.height[sample]) == image.size
    for shard in index.shards:
        assert sha256((small_set / shard.name).read_bytes()).hexdigest() == shard.sha256
        assert (small_set / shard.name).stat().st_size == shard.bytes
    assert sorted(path.name for path in small_set.iterdir()) == sorted(
        ["index.json", "report.csv", *(shard.name for shard in index.shards)]
    )


def test_webdataset_and_tarfile_read_the_shards(small_set):
    index = load_index(str(small_set))
    shards = sorted(map(str, small_set.glob("*.tar")))
    plain = wds.WebDataset(shards, shardshuffle=False).decode("pil")
    samples = list(plain)
    assert [sample["__key__"] for sample in samples] == index.keys
    for number, sample in enumerate(samples):
        assert sample[index.extensions[number]].size == (index.width[number], index.height[number])
    with tarfile.open(shards[0]) as tar:
        members = tar.getmembers()
    assert [member.offset_data for member in members] == index.offset[index.shard == 0].tolist()
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}


def test_width_and_height_are_those_of_the_upright_image(packaged_photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(packaged_photos[5]) as rocket:  # 640 × 427
        rocket.save(tmp_path / "turned.jpg", exif=exif)
    index = build([tmp_path / "turned.jpg"], tmp_path / "shards").index
    assert (index.width.tolist(), index.height.tolist()) == ([427], [640])


def test_the_same_images_give_the_same_bytes(photo_folder, small_set, tmp_path):
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(photo_folder, moved, copy_function=shutil.copy)
    build([moved], tmp_path / "set", workers=3)
    assert contents(tmp_path / "set") == contents(small_set)


def test_unusable_files_are_reported_with_the_reason(packaged_photos, tmp_path):
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    whole = packaged_photos[5].read_bytes()
    (photos / "rocket.jpg").write_bytes(whole)
    (photos / "no extension").write_bytes(packaged_photos[1].read_bytes())
    (photos / "sub" / "rocket.jpg").write_bytes(whole)
    (photos / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "empty.png").touch()
    (photos / "notes.txt").write_text("no image")
    (photos / "broken link.jpg").symlink_to(photos / "nowhere.jpg")
    (photos / os.fsdecode(b"odd\xff.jpg")).write_bytes(b"rubbish")
    Image.new("RGB", (300, 99)).save(photos / "narrow.png")
    built = build([photos], photos / "shards", min_side=100)  # the set may lie among the photos
    assert built.index.keys == ["no_extension", "rocket", "sub/rocket"]
    assert built.index.extensions == ["png", "jpg", "jpg"]
    with built.report.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    reasons = {Path(row["file"]).name: row["reason"] for row in rows}
    assert reasons.pop("truncated.jpg").startswith("broken image: ")
    assert reasons == {
        "empty.png": "empty file",
        "notes.txt": "not a JPEG, PNG or WebP image",
        "broken link.jpg": "cannot be read: No such file or directory",
        "odd\\xff.jpg": "not a JPEG, PNG or WebP image",
        "narrow.png": "too small: 300×99, smaller side under 100",
    }
    assert build([photos], photos / "shards", min_side=100).found_finished


def test_a_file_named_twice_or_linked_in_a_circle_is_stored_once(packaged_photos, tmp_path):
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    shutil.copy(packaged_photos[5], photos / "sub" / "rocket.jpg")
    (photos / "sub" / "again").symlink_to(photos)
    named = [photos, photos / "sub", photos / "sub" / "rocket.jpg"]
    assert build(named, tmp_path / "set").index.keys == ["sub/rocket"]


def test_keys_are_plain_and_unique():
    taken: dict[str, int] = {}
    names = ["x.jpg", "x.png", "x-2.webp", "a.b/c.d.jpg", "Ü/日本.jpg", "Ü/中国.jpg", "__x__.jpg"]
    names.append("y" * 300 + ".jpg")
    keys = [unique_key(name, taken) for name in names]
    assert keys[:7] == ["x", "x-2", "x-2-2", "a_b/c_d", "image/image", "image/image-2", "x-3"]
    assert keys[7] == "y" * 80
    assert all(key.isascii() and "." not in key for key in keys)


def test_a_finished_set_is_left_alone(photo_folder, small_set, tmp_path):
    before = contents(small_set)
    assert build([photo_folder], small_set).found_finished
    for different in ({"min_side": 50}, {"shard_size": 1000}):
        with refused("other-shards", "--out"):
            build([photo_folder], small_set, **different)
    with refused("other-shards", "--out"):
        build([photo_folder / "a"], small_set)
    assert contents(small_set) == before


def test_what_a_user_can_do_wrong(photo_folder, tmp_path):
    with refused("no-such-file"):
        build([tmp_path / "nowhere"], tmp_path / "set")
    (tmp_path / "bare").mkdir()
    with refused("empty-folder"):
        build([tmp_path / "bare"], tmp_path / "set")
    with refused("no-usable-images", "--min-side"):
        build([photo_folder], tmp_path / "set", min_side=5000)
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["report.csv"]
    (tmp_path / "file").touch()
    with refused("unwritable-shards", "--out"):
        build([photo_folder], tmp_path / "file")
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "shard-000000.tar").touch()
    with refused("shards-without-index", "--out"):
        build([photo_folder], tmp_path / "stray")


def test_two_builds_do_not_meet(photo_folder, tmp_path):
    hold = tmp_path / "unfinished" / "lock"
    hold.parent.mkdir()
    script = f"import fcntl, time; f = open({str(hold)!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True)"
    holder = subprocess.Popen([sys.executable, "-c", script + "; time.sleep(60)"], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with refused("build-in-progress", "--out"):
            build([photo_folder], tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    assert len(build([photo_folder], tmp_path).index) == 23


@pytest.fixture(scope="module")
def large_photos(tmp_path_factory) -> Path:
    """Photos that take long enough to interrupt a build of them."""
    photos = tmp_path_factory.mktemp("large")
    image = drawn_image(0, 900, 1200)
    for number in range(71):
        Image.fromarray(np.roll(image, 16 * number, axis=1)).save(photos / f"{number:02}.jpg", quality=95)
    return photos


@pytest.fixture(scope="module")
def large_set(large_photos, tmp_path_factory) -> dict[str, str]:
    """What an uninterrupted build of them holds."""
    out = tmp_path_factory.mktemp("whole") / "set"
    built = build([large_photos], out, shard_size=2_000_000)
    assert len(built.index) == 71 and len(built.index.shards) > 9
    return contents(out)


@pytest.mark.launch
@pytest.mark.parametrize(("workers", "blow"), [(1, signal.SIGINT), (2, signal.SIGKILL)])
def test_an_interrupted_build_goes_on_to_the_same_bytes(fork_server, large_photos, large_set, tmp_path, workers, blow):
    out = tmp_path / "broken"
    command = ["shards", "build", str(large_photos), "--shard-size", "2", "--workers", str(workers), "--out", str(out)]
    process = fork_server.start("hpcm_scale.cli", command, cwd=tmp_path, env=os.environ)
    try:
        while not (out / "unfinished" / "record-000001.json").exists():
            assert process.poll() is None
            time.sleep(0.002)
        workers_alive = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(blow)
        said = process.communicate(timeout=300)[1]
    if blow == signal.SIGINT:
        assert process.returncode == 130
        assert said == "hpcm: interrupted; run the same command again to continue\n"
    assert [path.name for path in out.iterdir()] == ["unfinished"]
    with refused("unfinished-shards", "data.shards"):
        load_index(str(out))
    assert not psutil.wait_procs(workers_alive, timeout=60)[1]
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "unfinished").glob("shard-*.tar")}
    assert 2 <= len(kept) < 10
    again = fork_server.start("hpcm_scale.cli", command, cwd=tmp_path, env=os.environ)
    assert again.wait(300) == 0, again.communicate()
    assert all((out / name).stat().st_mtime_ns == time_before for name, time_before in kept.items())
    assert not (out / "unfinished").exists()
    assert contents(out) == large_set


def test_a_build_killed_while_it_moves_shards_up_goes_on(photo_folder, small_set, tmp_path):
    """The state between two renames, made by hand from a finished set."""
    out = tmp_path / "set"
    build([photo_folder], out)
    index = load_index(str(out))
    unfinished = out / "unfinished"
    unfinished.mkdir()
    (unfinished / "plan.json").write_text(json.dumps({"fingerprint": index.built["fingerprint"]}))
    rows = {"key": index.keys, "extension": index.extensions}
    rows |= {column: getattr(index, column).tolist() for column in COLUMNS}
    for number, shard in enumerate(index.shards):
        mine = [i for i in range(23) if index.shard[i] == number]
        samples = {column: [values[i] for i in mine] for column, values in rows.items()}
        record = {"files": len(mine), "shard": vars(shard), "samples": samples, "skipped": []}
        (unfinished / f"record-{number:06d}.json").write_text(json.dumps(record))
    (out / "index.json").unlink()
    (out / index.shards[-1].name).rename(unfinished / index.shards[-1].name)
    build([photo_folder], out)
    assert contents(out) == contents(small_set)


def test_an_unfinished_build_of_other_images_is_begun_anew(photo_folder, small_set, tmp_path):
    out = tmp_path / "set"
    (out / "unfinished").mkdir(parents=True)
    (out / "unfinished" / "plan.json").write_text('{"fingerprint": "of something else"}')
    (out / "unfinished" / "record-000000.json").write_text("{}")
    (out / "unfinished" / "shard-000000.tar").touch()
    build([photo_folder], out)
    assert contents(out) == contents(small_set)
