"""What a stream hands out, image by image."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data.samples import CorruptSample
from hpcm_scale.data.stream import open_stream


class Seen(NamedTuple):
    """Of some batches."""

    keys: dict[int, str]
    """By global image index."""
    crops: dict[int, torch.Tensor]
    corrupt: list[CorruptSample]


def seen(location, *, last=48, seed=3, batch_size=4, processes=1, skip=(), **data) -> Seen:
    """Read the first `last` images of a set, as so many processes do, one after the other."""
    shards = location if isinstance(location, list) else str(location)
    config = DataConfig(**({"shards": shards, "crop": 64, "workers": 0, "retries": 2} | data))
    found = Seen({}, {}, [])
    for rank in range(processes):
        stream = open_stream(
            config,
            seed=seed,
            first_image=0,
            last_image=last,
            batch_size=batch_size,
            micro_batch_size=batch_size // processes,
            rank=rank,
            world_size=processes,
            skip=skip,
        )
        for batch in stream:
            for image, key, crop in zip(batch.image_index.tolist(), batch.keys, batch.images, strict=True):
                found.keys[image], found.crops[image] = key, crop
            found.corrupt.extend(batch.corrupt)
    return found


def assert_same(one: Seen, other: Seen) -> None:
    """Same images, same keys, same pixels."""
    assert one.keys == other.keys
    assert all(torch.equal(one.crops[image], other.crops[image]) for image in one.crops)
