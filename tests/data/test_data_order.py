"""The order of images: every image once an epoch, the same for any division of the work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data.index import load_index
from hpcm_scale.data.mixture import epoch_order, sample_at
from hpcm_scale.data.stream import Batch, open_stream


@given(st.integers(-(2**63), 2**63), st.integers(0, 2**40), st.integers(1, 3000))
def test_an_epoch_visits_every_sample_once(seed, epoch, size):
    assert (np.sort(epoch_order(seed, epoch, size)) == np.arange(size)).all()


def test_seeds_and_epochs_differ_and_are_fixed_for_ever():
    orders = {tuple(epoch_order(seed, epoch, 100)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400
    assert epoch_order(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert epoch_order(7, 3, 10).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]


def test_every_place_of_an_epoch_is_equally_likely():
    places = np.stack([epoch_order(1, epoch, 8) for epoch in range(4000)])
    counts = np.stack([(places == sample).sum(0) for sample in range(8)])
    assert (np.abs(counts - 500) < 5 * np.sqrt(500)).all()


@given(st.integers(0, 10**6), st.integers(0, 500), st.integers(1, 50))
def test_samples_follow_the_epochs(seed, image, size):
    assert sample_at(seed, image, size) == epoch_order(seed, image // size, size)[image % size]


def read(config: DataConfig, first: int, last: int, batch: int, micro: int, world: int, seed: int = 5):
    """All ranks' micro-batches, put back in global order: keys and images by global image index."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for rank in range(world):
        stream = open_stream(
            config,
            seed=seed,
            first_image=first,
            last_image=last,
            batch_size=batch,
            micro_batch_size=micro,
            rank=rank,
            world_size=world,
        )
        for number, micro_batch in enumerate(stream):
            assert isinstance(micro_batch, Batch)
            start = first + (number * world + rank) * micro
            assert micro_batch.image_index.tolist() == list(range(start, start + micro))
            assert micro_batch.image_index.dtype == torch.int64
            assert micro_batch.images.dtype == torch.uint8
            assert micro_batch.images.shape == (micro, 3, config.crop, config.crop)
            for image, key, pixels in zip(
                micro_batch.image_index.tolist(), micro_batch.keys, micro_batch.images, strict=True
            ):
                assert image not in found
                found[image] = key, pixels
    assert sorted(found) == list(range(first, last))
    return found


def assert_same(left: dict, right: dict) -> None:
    for image in left:
        assert left[image][0] == right[image][0]
        assert torch.equal(left[image][1], right[image][1])


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    world=st.sampled_from([1, 2, 4]),
    micro=st.integers(1, 3),
    rounds=st.integers(1, 3),
    steps=st.integers(1, 4),
    data=st.data(),
)
def test_any_division_and_any_resumption_give_the_global_order(small_set, seed, world, micro, rounds, steps, data):
    config = DataConfig(shards=str(small_set), crop=32, workers=0)
    batch = world * micro * rounds
    whole = read(config, 0, steps * batch, batch, batch, 1, seed)
    index = load_index(str(small_set))
    assert [whole[i][0] for i in whole] == [index.keys[sample_at(seed, i, len(index))] for i in whole]
    assert_same(whole, read(config, 0, steps * batch, batch, micro, world, seed))
    resumed = data.draw(st.integers(0, steps - 1)) * batch
    rest = read(config, resumed, steps * batch, batch, micro, world, seed)
    assert_same(rest, {image: whole[image] for image in rest})


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_worker_processes_change_nothing(small_set, world, workers):
    alone = DataConfig(shards=str(small_set), crop=64, workers=0)
    many = DataConfig(shards=str(small_set), crop=64, workers=workers)
    # 60 images of 23: batches straddle epochs, and the micro-batches do not divide by the workers
    assert_same(read(alone, 0, 60, 12, 12, 1), read(many, 0, 60, 12, 6 // world, world))


def test_crops_change_between_epochs_and_seeds(small_set):
    config = DataConfig(shards=str(small_set), crop=32, workers=0)
    found = [*read(config, 0, 46, 23, 23, 1).values()]
    crops = [dict(found[:23]), dict(found[23:]), dict(read(config, 0, 23, 23, 23, 1, seed=6).values())]
    for other in crops[1:]:
        assert crops[0].keys() == other.keys()
        # pieces of the night sky may look the same twice
        assert sum(torch.equal(crops[0][key], other[key]) for key in other) < 5
