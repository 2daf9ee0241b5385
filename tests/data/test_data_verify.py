"""Any damage to a set is found and named; the commands say it in lines a user can act on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from data_refusals import refused
from drawn_images import write_images
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcm_scale.data.index import load_index
from hpcm_scale.data.verify import verify_shards
from hpcm_scale.tracking.progress import progress


def damages(folder: Path) -> list[str]:
    return [str(d) for d in verify_shards(folder, load_index(str(folder)), workers=1, progress=progress)]


def flip(path: Path, position: int, bits: int = 0x10) -> None:
    with path.open("r+b") as handle:
        handle.seek(position)
        byte = handle.read(1)[0]
        handle.seek(position)
        handle.write(bytes([byte ^ bits]))


@pytest.fixture
def copy(small_set, tmp_path) -> Path:
    return Path(shutil.copytree(small_set, tmp_path / "copy"))


def test_a_sound_set_has_no_damage(small_set):
    assert damages(small_set) == []


@pytest.fixture(scope="module")
def scratch(small_set, tmp_path_factory) -> Path:
    return Path(shutil.copytree(small_set, tmp_path_factory.mktemp("scratch") / "set"))


@settings(max_examples=20, deadline=None)
@given(data=st.data(), bits=st.integers(1, 255))
def test_any_flipped_byte_of_an_image_names_shard_and_sample(scratch, data, bits):
    index = load_index(str(scratch))
    sample = data.draw(st.integers(0, len(index) - 1))
    position = int(index.offset[sample]) + data.draw(st.integers(0, int(index.length[sample]) - 1))
    shard = index.shards[index.shard[sample]].name
    flip(scratch / shard, position, bits)
    try:
        assert damages(scratch) == [f"{shard}: sample {index.keys[sample]}: its bytes are damaged"]
    finally:
        flip(scratch / shard, position, bits)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), bits=st.integers(1, 255))
def test_any_flipped_byte_anywhere_names_the_shard(scratch, data, bits):
    shard = data.draw(st.sampled_from(load_index(str(scratch)).shards))
    position = data.draw(st.integers(0, shard.bytes - 1))
    flip(scratch / shard.name, position, bits)
    try:
        found = damages(scratch)
        assert len(found) == 1 and found[0].startswith(f"{shard.name}: ")
    finally:
        flip(scratch / shard.name, position, bits)


def test_damage_between_images_is_told_apart(copy):
    index = load_index(str(copy))
    shard, offset, length = index.shards[0], int(index.offset[1]), int(index.length[1])
    key = index.keys[1]
    flip(copy / shard.name, offset - 512)
    assert damages(copy) == [f"{shard.name}: sample {key}: its tar header is damaged (bad checksum)"]
    flip(copy / shard.name, offset - 512)
    assert length % 512
    flip(copy / shard.name, offset + length)
    assert damages(copy) == [f"{shard.name}: sample {key}: the padding after it is damaged"]
    flip(copy / shard.name, offset + length)
    flip(copy / shard.name, shard.bytes - 1)
    assert damages(copy) == [f"{shard.name}: its sha256 differs, although every image in it is intact"]


def test_missing_cut_and_unlisted_shards(copy):
    index = load_index(str(copy))
    first, second, *_, last = index.shards
    (copy / first.name).unlink()
    with (copy / second.name).open("r+b") as handle:
        handle.truncate(int(index.offset[index.shard == 1][-1]) + 5)
    with (copy / last.name).open("ab") as handle:
        handle.write(b"\0" * 512)
    (copy / "shard-000099.tar").touch()
    size = (copy / second.name).stat().st_size
    cut_key = [key for key, shard in zip(index.keys, index.shard, strict=True) if shard == 1][-1]
    assert damages(copy) == [
        "shard-000099.tar: not in the index",
        f"{first.name}: missing",
        f"{second.name}: {size} bytes instead of {second.bytes}",
        f"{second.name}: sample {cut_key}: cut off",
        f"{last.name}: {last.bytes + 512} bytes instead of {last.bytes}",
    ]


def test_an_index_that_does_not_fit_its_tars(copy):
    content = json.loads((copy / "index.json").read_text())
    key, shard = content["samples"]["key"][0], content["shards"][0]["name"]
    content["samples"]["key"][0] = "other"
    content["samples"]["width"][1] += 1
    (copy / "index.json").write_text(json.dumps(content))
    first, second = damages(copy)
    assert first.startswith(f"{shard}: sample other: the tar holds {key}.jpg of ")
    assert "pixels instead of" in second


@pytest.mark.launch
def test_the_command_on_more_images_than_one_job_verifies(tmp_path, shards_command):
    photos = write_images(tmp_path / "photos", {f"{number:02}.jpg": (256, 320) for number in range(40)})
    out = tmp_path / "shards"
    built = shards_command("build", *photos, "--out", out)
    assert (built.returncode, built.stderr) == (0, "")
    assert built.stdout == "40 images in 1 shard, none skipped\n"
    again = shards_command("build", *photos, "--out", out)
    assert again.stdout == f"{out} is already finished: 40 images in 1 shard, none skipped\n"
    sound = shards_command("verify", out)
    assert (sound.returncode, sound.stderr) == (0, "")
    assert sound.stdout == "40 images in 1 shard: every hash matches and every image decodes\n"
    index = load_index(str(out))
    flip(out / "shard-000000.tar", int(index.offset[37]) + 1000)
    damaged = shards_command("verify", out)
    assert damaged.returncode == 1
    assert damaged.stdout.splitlines() == [
        f"damaged: shard-000000.tar: sample {index.keys[37]}: its bytes are damaged",
        "1 problem in 40 images in 1 shard; restore from a copy or build again",
    ]


def test_the_command_describes_a_set(small_set, shards_command):
    lines = shards_command("info", small_set).stdout.splitlines()
    index = load_index(str(small_set))
    assert lines[0] == f"{small_set}: 23 images in {len(index.shards)} shards"
    assert f"{index.pixels / 1e6:,.1f} megapixels" in lines[1]
    assert f"smallest side {min(index.width.min(), index.height.min())} pixels" in lines[2]
    assert "0 to 255" in lines[5] and " 23 " in lines[5]


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "{}/nowhere"],
        ["info", "{}/nowhere"],
        ["build", "{}/nowhere", "--out", "{}/set"],
        ["build", "{}", "--out", "{}/set"],
        ["build", "{}", "--out", "{}/set", "--workers", "0"],
        ["build", "{}", "--out", "{}/set", "--shard-size", "0"],
        ["verify", "http://localhost:1/set"],
        ["info", "nosuchscheme://host/set"],
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, shards_command, arguments):
    done = shards_command(*(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("hpcm: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("damage", ["", "{", '{"format": "something else"}', "[]", "truncate", "columns"])
def test_a_useless_index_is_one_sentence(copy, damage):
    text = (copy / "index.json").read_text()
    if damage == "columns":
        content = json.loads(text)
        content["samples"]["width"].pop()
        damage = json.dumps(content)
    (copy / "index.json").write_text(text[:-9] if damage == "truncate" else damage)
    with refused("damaged-index", "data.shards"):
        load_index(str(copy))
