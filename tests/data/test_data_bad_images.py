"""A photo that cannot be had is replaced by another, the same whatever the processes, and named."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from zlib import crc32

import pytest
import torch
from crops import seen
from data_refusals import refused
from PIL import Image
from range_server import RangeServer

from hpcm_scale.data import storage
from hpcm_scale.data.build import build_shards
from hpcm_scale.data.index import ShardIndex, load_index
from hpcm_scale.data.mixture import sample_at
from hpcm_scale.data.storage import pause
from hpcm_scale.errors import UserError
from hpcm_scale.tracking.progress import progress

SEED, LAST = 3, 48


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(storage, "pause", lambda attempt: pause(attempt) / 50)


@pytest.fixture
def folder(small_set, tmp_path) -> Path:
    return Path(shutil.copytree(small_set, tmp_path / "set"))


@pytest.fixture(scope="module")
def sound(small_set):
    """What is seen of the set before anything happens to it, far beyond the images that the tests read."""
    return seen(small_set, last=8 * 23 + 8 * 4 + 4)


def place(folder: Path, index: ShardIndex, sample: int) -> tuple[Path, int]:
    """Where a photo lies."""
    return folder / index.shards[index.shard[sample]].name, int(index.offset[sample])


def overwrite(folder: Path, index: ShardIndex, sample: int, data: bytes = b"damage", at: int = 100) -> None:
    shard, offset = place(folder, index, sample)
    with shard.open("r+b") as handle:
        handle.seek(offset + at)
        handle.write(data)


def assert_replaced(found, sound, index: ShardIndex, bad: set[int]) -> None:
    """Every image is the first at its place, in its own epoch or a later one, whose photo is not bad."""
    size = len(index)
    for image in range(LAST):
        turns = [turn for turn in range(image, image + 8 * size, size) if sample_at(SEED, turn, size) not in bad]
        assert found.keys[image] == sound.keys[turns[0]]
        assert torch.equal(found.crops[image], sound.crops[turns[0]])
    assert {photo.sample for photo in found.corrupt} == bad


def test_damaged_images_are_replaced_by_the_same_place_of_the_next_epoch(folder, sound):
    index = load_index(str(folder))
    bad = {sample_at(SEED, 5, 23), sample_at(SEED, 28, 23), 11}  # 28 is what would replace 5
    for sample in bad:
        overwrite(folder, index, sample)
    found = seen(folder)
    assert_replaced(found, sound, index, bad)
    for photo in found.corrupt:
        shard, _ = place(folder, index, photo.sample)
        assert photo.reason == f"sample {index.keys[photo.sample]} in {shard} is damaged"


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (1, 2), (2, 1)])
def test_what_replaces_them_depends_on_no_process(folder, sound, workers, processes):
    index = load_index(str(folder))
    overwrite(folder, index, sample_at(SEED, 9, 23))
    (folder / index.shards[1].name).unlink()
    with (folder / index.shards[2].name).open("r+b") as handle:
        handle.truncate(int(index.offset[index.shard == 2][-1]) + 5)
    gone = set((index.shard == 1).nonzero()[0].tolist())
    cut = int((index.shard == 2).nonzero()[0][-1])
    found = seen(folder, workers=workers, processes=processes)
    assert_replaced(found, sound, index, {sample_at(SEED, 9, 23), cut} | gone)
    reasons = dict(found.corrupt)
    assert reasons[min(gone)] == (
        f"sample {index.keys[min(gone)]} in {folder / index.shards[1].name} cannot be read: the shard is missing"
    )
    assert reasons[cut].endswith("is damaged")


def test_images_that_do_not_decode_are_replaced(folder, sound):
    """With their hashes right: they were broken before they were stored, or Pillow has become stricter."""
    content = json.loads((folder / "index.json").read_text())
    index = load_index(str(folder))
    rubbish, bomb = sample_at(SEED, 4, 23), sample_at(SEED, 6, 23)
    with io.BytesIO() as file:
        Image.new("1", (20_000, 20_000)).save(file, "PNG")
        photos = {rubbish: b"x" * 90, bomb: file.getvalue()[:200]}
    for sample, data in photos.items():
        overwrite(folder, index, sample, data, at=0)
        content["samples"]["length"][sample] = len(data)
        content["samples"]["crc32"][sample] = crc32(data)
    (folder / "index.json").write_text(json.dumps(content))
    found = seen(folder)
    assert_replaced(found, sound, index, {rubbish, bomb})
    reasons = dict(found.corrupt)
    assert reasons[rubbish].endswith(" cannot be decoded: not a JPEG, PNG or WebP image")
    assert reasons[bomb].endswith(" cannot be decoded: too many pixels: more than 170,000,000")


def test_images_left_out_are_replaced_alike(small_set, sound):
    found = seen(small_set, skip=[range(8, 12), range(20, 35)])
    for image in range(LAST):
        out = 8 <= image < 12 or 20 <= image < 35
        turn = image + 46 if out and 20 <= image + 23 < 35 else image + 23 if out else image
        assert found.keys[image] == sound.keys[turn]
        assert torch.equal(found.crops[image], sound.crops[turn])
    assert found.corrupt == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_without_a_sound_image_is_one_error(folder, workers):
    index = load_index(str(folder))
    for shard in index.shards:
        (folder / shard.name).unlink()
    with pytest.raises(UserError) as caught:
        seen(folder, workers=workers)
    text = str(caught.value)
    assert caught.value.code == "all-samples-corrupt" and "\n" not in text
    assert "cannot be read: the shard is missing); restore the shards" in text


def test_a_set_of_one_image(packaged_photos, tmp_path):
    built = build_shards(
        [packaged_photos[5]], tmp_path / "one", min_side=0, shard_size=10**9, workers=1, progress=progress
    )
    whole = seen(tmp_path / "one", last=4)
    assert set(whole.keys.values()) == {"rocket"} and len({crop.numpy().tobytes() for crop in whole.crops.values()}) > 1
    left_out = seen(tmp_path / "one", last=4, skip=[range(2)])
    assert torch.equal(left_out.crops[0], whole.crops[2]) and torch.equal(left_out.crops[1], whole.crops[2])
    overwrite(tmp_path / "one", built.index, 0)
    with refused("all-samples-corrupt", "data.shards"):
        seen(tmp_path / "one", last=4)


@pytest.fixture(scope="module")
def fine_set(photo_folder, tmp_path_factory) -> Path:
    """The same photos, each in a shard of its own."""
    out = tmp_path_factory.mktemp("fine") / "shards"
    build_shards([photo_folder], out, min_side=0, shard_size=1, workers=1, progress=progress)
    return out


@pytest.fixture
def server(fine_set, tmp_path):
    with RangeServer(Path(shutil.copytree(fine_set, tmp_path / "served"))) as running:
        yield running


@pytest.mark.parametrize(("workers", "cached"), [(0, False), (2, True)], ids=["ranges", "cache"])
def test_what_a_server_fails_to_give_for_good(server, sound, tmp_path, workers, cached):
    """Shards that answer 503, are forbidden, are gone, come with a wrong byte, are cut short every time."""
    index = load_index(str(server.folder))
    names = [shard.name for shard in index.shards]
    server.status = {names[0]: 503, names[1]: 403}
    (server.folder / names[2]).unlink()
    overwrite(server.folder, index, 3)
    server.cut_short[names[4]] = 10**6
    found = seen(server.url, workers=workers, cache=str(tmp_path / "cache") if cached else None)
    assert_replaced(found, sound, index, {0, 1, 2, 3, 4})
    reasons = {photo.sample: photo.reason for photo in reversed(found.corrupt)}
    # Right after a shard that failed, one is tried once; where another worker fetches into the cache, it may be any.
    tries = "(2 tries|1 try)" if cached and workers else "2 tries"
    for sample, said in enumerate(
        (
            rf"cannot be read after {tries} \(ClientResponseError 503",
            r"cannot be read after 1 try \(ClientResponseError 403",
            "cannot be read: the shard is missing",
            rf"cannot be read after {tries} \(OSError the downloaded file is not the shard" if cached else "is damaged",
            "cannot be read after ",
        )
    ):
        place = re.escape(f"sample {index.keys[sample]} in {server.url}/{names[sample]} ")
        assert re.match(place + said, reasons[sample])
        assert "Traceback" not in reasons[sample] and "\n" not in reasons[sample]
    if cached:
        kept = {path.name for path in (tmp_path / "cache").iterdir()}
        assert kept == {".lock", *(f"{shard.sha256}.tar" for shard in index.shards[5:])}


def test_a_shard_that_was_given_up_is_not_asked_for_again_at_once(server):
    server.status["shard-000007.tar"] = 503
    found = seen(server.url, retries=3, last=92)
    assert len(found.corrupt) == 4 and server.requests["shard-000007.tar"] == 3


def test_a_silent_server_is_given_up_after_a_bounded_number_of_tries(server):
    """All tries are spent once; after that each photo is tried once."""
    server.delay = {f"shard-{number:06d}.tar": 60.0 for number in range(23)}
    with pytest.raises(UserError, match=r"samples tried .*after 1 try \(\w*Timeout"):
        seen(server.url, timeout=0.5, retries=3)
    tries = [count for name, count in server.requests.items() if name in server.delay]
    assert max(tries) <= 3 and sum(tries) <= len(tries) + 2


def test_a_server_without_ranges_is_an_error_at_once(server):
    server.ranges = False
    with refused("no-range-requests", "data.cache"):
        seen(server.url, workers=2)
