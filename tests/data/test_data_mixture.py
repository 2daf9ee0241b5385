"""Several sets in one order: exact shares, every photo once an epoch of its set, the same for any division."""

from __future__ import annotations

import shutil
from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
import torch
from crops import Seen, assert_same, seen
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image
from psutil import Process

from hpcm_scale.config.checks import check
from hpcm_scale.config.compose import compose, to_yaml
from hpcm_scale.config.schema import DataConfig, ShardSet
from hpcm_scale.data.build import build_shards
from hpcm_scale.data.index import Shard, ShardIndex, load_index
from hpcm_scale.data.mixture import BLOCK, MixtureOrder, load_mixture, set_seed
from hpcm_scale.data.storage import LocalStorage
from hpcm_scale.data.stream import open_stream
from hpcm_scale.errors import UserError
from hpcm_scale.tracking.progress import progress
from hpcm_scale.training.start import prepare

SEED, LAST = 3, 96


@pytest.fixture(scope="module")
def other_set(packaged_photos, tmp_path_factory) -> Path:
    """Seven photos in several shards."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "photos").mkdir()
    with Image.open(packaged_photos[5]) as photo:
        for number in range(7):
            photo.crop((60 * number, 50, 60 * number + 100, 170)).save(folder / "photos" / f"other {number}.jpg")
    build_shards([folder / "photos"], folder / "shards", min_side=0, shard_size=6_000, workers=1, progress=progress)
    return folder / "shards"


@pytest.fixture(scope="module")
def mixed(small_set, other_set) -> Seen:
    """What is seen of three parts of the one and five of the other, before anything happens to them."""
    return seen(mix(small_set, other_set), last=3 * LAST)


def mix(*locations: Path, weights: tuple[float, ...] = (3, 5)) -> list:
    """data.shards for these sets."""
    return [{"path": str(path), "weight": weight} for path, weight in zip(locations, weights, strict=True)]


weights = st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any)


def order_of(seed: int, weights: list[int]) -> MixtureOrder:
    return MixtureOrder(seed, [Fraction(weight, sum(weights)) for weight in weights])


@given(st.integers(0, 2**63), weights, st.integers(0, 2**40), st.integers(0, 3 * BLOCK))
def test_each_set_goes_through_its_own_order_without_gaps(seed, weights, block, skipped):
    """From any place on, so that every photo comes once in an epoch of its set."""
    order = order_of(seed, weights)
    first = block * order.length + skipped
    come = order.positions_before(first)
    assert sum(come) == first
    for image in range(first, first + BLOCK + 300):
        number, turn = order.position_at(image)
        assert turn == come[number]
        come[number] += 1
    assert come == order.positions_before(first + BLOCK + 300)


@given(st.integers(0, 2**63), weights, st.integers(1, 2**40))
def test_the_shares_are_exact_in_the_long_run(seed, weights, block):
    order = order_of(seed, weights)
    for weight, come in zip(weights, order.positions_before(block * order.length), strict=True):
        assert abs(come - Fraction(block * order.length * weight, sum(weights))) < 1


def test_inside_a_block_every_place_may_be_of_any_set():
    order = order_of(0, [1, 3])
    found = [order.position_at(image)[0] for image in range(BLOCK)]
    assert sum(found) == 3 * BLOCK // 4
    assert 0.15 < sum(number == 0 for number in found[: BLOCK // 4]) / (BLOCK // 4) < 0.35
    assert found != [order_of(1, [1, 3]).position_at(image)[0] for image in range(BLOCK)]
    assert found != [order.position_at(BLOCK + image)[0] for image in range(BLOCK)]


def test_the_order_is_fixed_for_ever():
    order = order_of(7, [2, 1, 1])
    assert [order.position_at(image) for image in range(6)] == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0)]
    far = [(0, 500000000000), (0, 500000000001), (1, 250000000000)]
    assert [order.position_at(10**12 + image) for image in range(3)] == far
    assert [set_seed(7, number) for number in range(3)] == [7, 12905894811985665595, 15557313473941088544]


def test_a_set_with_a_small_share_gets_a_place_of_a_longer_block():
    order = order_of(0, [9999, 1])
    assert order.length == 2**14 and [order.positions_before(block * 2**14)[1] for block in (0, 1, 5)] == [0, 2, 9]


def test_a_single_set_is_as_it_was(small_set):
    order = order_of(SEED, [5])
    assert all(order.position_at(image) == (0, image) for image in (0, 1, 1023, 1024, 10**12))
    assert_same(seen(small_set), seen(mix(small_set, weights=(0.3,))))
    index = load_index(str(small_set))
    assert load_mixture(DataConfig(shards=mix(small_set, weights=(0.3,)))).digest == index.digest


def test_every_set_comes_as_it_would_alone(small_set, other_set, mixed):
    """With a seed of its own, and the first with that of the run."""
    order = MixtureOrder(SEED, [Fraction(3, 8), Fraction(5, 8)])
    alone = [seen(small_set, last=3 * LAST), seen(other_set, last=3 * LAST, seed=set_seed(SEED, 1))]
    for image in range(3 * LAST):
        number, turn = order.position_at(image)
        assert mixed.keys[image] == alone[number].keys[turn]
        assert torch.equal(mixed.crops[image], alone[number].crops[turn])
    share = sum(key.startswith("other") for key in mixed.keys.values()) / (3 * LAST)
    assert share == pytest.approx(5 / 8, abs=0.1)


def test_without_weights_the_images_count(small_set, other_set):
    def shares(*entries: object) -> list[Fraction]:
        return load_mixture(DataConfig(shards=list(entries))).shares

    small, other = str(small_set), str(other_set)
    assert shares(small, {"path": other}) == [Fraction(23, 30), Fraction(7, 30)]
    assert shares({"path": small, "weight": 2}, other) == [Fraction(2, 3), Fraction(1, 3)]


@pytest.mark.parametrize(("workers", "processes"), [(0, 2), (1, 4), (2, 1), (2, 2)])
def test_any_division_gives_the_same(small_set, other_set, mixed, workers, processes):
    found = seen(mix(small_set, other_set), last=LAST, processes=processes, workers=workers)
    assert found.keys == {image: mixed.keys[image] for image in range(LAST)}
    assert all(torch.equal(found.crops[image], mixed.crops[image]) for image in range(LAST))


@pytest.mark.parametrize(("first", "batch_size"), [(40, 4), (42, 6)])  # the batch may change on the way
def test_any_resumption_goes_on_with_what_is_left(small_set, other_set, mixed, first, batch_size):
    config = DataConfig(shards=mix(small_set, other_set, weights=(0.3, 0.5)), crop=64, workers=0)
    stream = open_stream(
        config,
        seed=SEED,
        first_image=first,
        last_image=first + 5 * batch_size,
        batch_size=batch_size,
        micro_batch_size=batch_size,
        rank=0,
        world_size=1,
    )
    images = range(first, first + 5 * batch_size)
    for batch in stream:
        for image, key, crop in zip(batch.image_index.tolist(), batch.keys, batch.images, strict=True):
            assert key == mixed.keys[image] and torch.equal(crop, mixed.crops[image])
            images = images[1:]
    assert not images


def turns_of(order: MixtureOrder, images: int) -> dict[tuple[int, int], int]:
    """Global image index by set and turn."""
    return {order.position_at(image): image for image in range(images)}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_replaced_within_their_set(small_set, other_set, mixed, tmp_path, workers):
    """And named by a number that no image of another set has."""
    folder = Path(shutil.copytree(other_set, tmp_path / "other"))
    index = load_index(str(folder))
    (folder / index.shards[0].name).unlink()
    bad = {23 + sample for sample in (index.shard == 0).nonzero()[0].tolist()}
    assert 0 < len(bad) < 7
    found = seen(mix(small_set, folder), last=LAST, workers=workers)
    assert {photo.sample for photo in found.corrupt} == bad and set(found.keys) == set(range(LAST))
    order = order_of(SEED, [3, 5])
    places = turns_of(order, 3 * LAST)
    gone = {index.keys[sample - 23] for sample in bad}
    replaced = 0
    for image in range(LAST):
        number, turn = order.position_at(image)
        while mixed.keys[places[number, turn]] in gone:
            turn += 7
            replaced += 1
        assert found.keys[image] == mixed.keys[places[number, turn]]
        assert torch.equal(found.crops[image], mixed.crops[places[number, turn]])
    assert replaced > 10


def test_images_left_out_are_replaced_within_their_set(small_set, other_set, mixed):
    spans = [range(8, 20), range(30, 47)]
    found = seen(mix(small_set, other_set), last=LAST, skip=spans)
    order = order_of(SEED, [3, 5])
    places = turns_of(order, 3 * LAST)
    for image in range(LAST):
        number, turn = order.position_at(image)
        while any(places[number, turn] in span for span in spans):
            turn += (23, 7)[number]
        assert found.keys[image] == mixed.keys[places[number, turn]]
        assert torch.equal(found.crops[image], mixed.crops[places[number, turn]])


def test_the_digest_tells_what_trains_alike(small_set, other_set):
    def digest(*locations: Path, weights: tuple[float, ...] = ()) -> str:
        shards = mix(*locations, weights=weights) if weights else [*map(str, locations)]
        return load_mixture(DataConfig(shards=shards)).digest

    assert digest(small_set, other_set) == digest(small_set, other_set, weights=(23, 7))
    assert digest(small_set, other_set, weights=(0.3, 0.1)) == digest(small_set, other_set, weights=(3, 1))
    others = {
        digest(small_set),
        digest(other_set),
        digest(small_set, other_set),
        digest(other_set, small_set),
        digest(small_set, other_set, weights=(3, 1)),
        digest(small_set, other_set, weights=(1, 0)),
    }
    assert len(others) == 6


def test_runs_of_a_sweep_read_every_index_once(small_set, other_set, tmp_path):
    asked = []

    @cache
    def open_index(location, **options):
        asked.append(location)
        return load_index(location, **options)

    for share in (1, 2):
        shards = f"data.shards=[{{path: '{small_set}', weight: {share}}}, {{path: '{other_set}', weight: 1}}]"
        config = compose(["model=nano", shards, f"run.dir='{tmp_path / str(share)}'"])
        start = prepare(config, 1, open_index=open_index)
        assert start.index.shares == [Fraction(share, share + 1), Fraction(1, share + 1)]
    assert asked == [str(small_set), str(other_set)]


ACCEPTED = {
    "shards": [ShardSet("shards")],
    "2026": [ShardSet("2026")],
    "[a, 'https://host/b']": [ShardSet("a"), ShardSet("https://host/b")],
    "[{path: a, weight: 2}, {path: b}]": [ShardSet("a", 2), ShardSet("b")],
    "[]": [],
    "null": [],
}


@pytest.mark.parametrize("value", ACCEPTED)
def test_one_key_names_a_set_or_several(value):
    """On the command line and in the configuration that a run folder keeps."""
    config = compose(["model=nano", f"data.shards={value}"])
    check(config, 1)
    assert config.data.sets == ACCEPTED[value]
    assert OmegaConf.create(to_yaml(config)).data.shards == config.data.shards


REFUSED = {
    "[{path: a, wieght: 2}]": ("shards-entry", "data.shards"),
    "[{weight: 2}]": ("shards-entry", "data.shards"),
    "[[a]]": ("shards-entry", "data.shards"),
    "[{path: a, weight: many}]": ("shards-weight", "data.shards"),
    "[{path: a, weight: 0}, {path: b, weight: 0}]": ("zero-weights", "data.shards"),
    "[a, 'pipe:cat {}']": ("pipe-not-allowed", "data.pipe"),
}


@pytest.mark.parametrize("value", REFUSED)
def test_what_cannot_be_mixed_is_refused_before_anything_is_read(value):
    with pytest.raises(UserError) as caught:
        check(compose(["model=nano", f"data.shards={value}"]), 1)
    assert (caught.value.code, caught.value.key) == REFUSED[value]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("[{path: a, weight: -1}]", "data.shards.weight=-1 must be at least 0"),
        ("[{path: a, weight: nan}]", "data.shards.weight=nan must be at least 0"),
        ("[a, 'https://u:hunter2@host/set']", "data.shards holds a password, token or signature"),
    ],
)
def test_weights_and_secrets_are_refused_by_the_checks_of_all_keys(value, text):
    with pytest.raises(UserError, match=f"^{text}") as caught:
        check(compose(["model=nano", f"data.shards={value}"]), 1)
    assert "hunter2" not in str(caught.value)


def test_a_further_pipe_needs_a_cache():
    with pytest.raises(UserError) as caught:
        check(compose(["model=nano", "data.shards=[one, 'pipe:cat {}']", "data.pipe=true"]), 1)
    assert (caught.value.code, caught.value.key) == ("pipe-without-cache", "data.cache")


def test_all_sets_share_the_files_that_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(LocalStorage, "OPEN_FILES", 6)
    for number in range(10):
        (tmp_path / f"{number}").write_bytes(bytes([number]))
    before = Process().num_fds()
    storages = [LocalStorage(tmp_path), LocalStorage(tmp_path)]
    for number in range(10):
        assert all(storage.read(f"{number}") == bytes([number]) for storage in storages)
    assert Process().num_fds() <= before + 6
    for storage in storages:
        storage.close()


def test_sets_that_cannot_be_mixed(small_set, other_set, tmp_path):
    def refused(*entries: object) -> str:
        with pytest.raises(UserError) as caught:
            load_mixture(DataConfig(shards=[str(small_set), *entries]))
        assert caught.value.key == "data.shards"
        return caught.value.code

    assert refused(str(other_set), str(shutil.copytree(small_set, tmp_path / "copy"))) == "duplicate-shards"
    assert refused(str(other_set), str(tmp_path / "nowhere")) == "no-shards-there"
    assert refused({"path": str(other_set), "weight": 1e-9}) == "weight-too-small"
    (tmp_path / "empty").mkdir()
    columns = ("key", "extension", "shard", "offset", "length", "width", "height", "crc32")
    empty = ShardIndex([Shard("a.tar", 1024, "0" * 64)], {column: [] for column in columns}, {})
    (tmp_path / "empty" / "index.json").write_text(empty.to_json())
    assert refused(str(tmp_path / "empty")) == "empty-shards"
    load_mixture(DataConfig(shards=mix(small_set, other_set, weights=(1, 0))))
