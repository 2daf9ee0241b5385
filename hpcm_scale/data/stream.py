"""Endless, resumable micro-batches of training crops, through webdataset."""

from __future__ import annotations

import atexit
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from zlib import crc32

import torch
import webdataset as wds

from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data.cache import CachedStorage
from hpcm_scale.data.crop import cut
from hpcm_scale.data.images import decode, to_array
from hpcm_scale.data.index import ShardIndex, load_index
from hpcm_scale.data.order import sample_at
from hpcm_scale.data.processes import follow
from hpcm_scale.data.storage import LocalStorage, RemoteStorage, open_storage
from hpcm_scale.errors import UserError

Storage = LocalStorage | RemoteStorage | CachedStorage


@dataclass
class Batch:
    """One micro-batch of one process."""

    images: torch.Tensor
    """Crops, uint8 (b, 3, crop, crop), RGB."""
    image_index: torch.Tensor
    """Global image indices, int64 (b,)."""
    keys: list[str]
    """Keys of the samples in the shards."""
    upscaled: int
    """How many photos were smaller than the crop and were scaled up to it."""


def open_stream(
    config: DataConfig,
    *,
    seed: int,
    first_image: int,
    last_image: int | None,
    batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    index: ShardIndex | None = None,
) -> Iterator[Batch]:
    """The micro-batches of process `rank`, in order, from global image index `first_image` on.

    Micro-batch j (from 0) of this process holds the global images from first_image +
    (j · world_size + rank) · micro_batch_size on: the batches of `batch_size` images follow each other
    without gaps, whatever the number of processes and of `config.workers`. Images, their order and
    their crops are a pure function of the seed, the set and `config.crop` and `config.flip`.

    Ends before global image `last_image`, never if that is None. `first_image` and `last_image` are
    multiples of `batch_size`, which is a multiple of micro_batch_size · world_size. `index` is that of
    `config.shards` where it has been read already. Call `close()` on
    the iterator to end its workers. Raises `UserError` at once if the shards are missing, and while
    iterating if a photo cannot be read.
    """
    assert batch_size % (micro_batch_size * world_size) == 0
    assert first_image % batch_size == 0
    assert last_image is None or last_image % batch_size == 0
    index = index or load_index(config.shards, retries=config.retries, timeout=config.timeout)
    stride = micro_batch_size * world_size
    start = first_image + rank * micro_batch_size
    starts = range(start, sys.maxsize if last_image is None else last_image, stride)
    pipeline = wds.DataPipeline(
        Source(config, index, seed, starts, micro_batch_size),
        wds.map(partial(prepare, crop=config.crop, flip=config.flip, seed=seed)),
        wds.batched(micro_batch_size, collation_fn=collate, partial=False),
        hand_over_errors,
    )
    stop_here, stop_there = multiprocessing.Pipe(duplex=False)
    loader = wds.WebLoader(
        pipeline,
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        worker_init_fn=partial(start_worker, stop_here),
        generator=torch.Generator(),  # its own: the global one belongs to the training loop
    )
    return deliver(loader, stop_there)


@dataclass
class Source:
    """First stage: the samples of this worker's micro-batches, read in global order."""

    config: DataConfig
    index: ShardIndex
    seed: int
    starts: range
    """First global image of each micro-batch of this process."""
    micro_batch_size: int

    def __call__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        share, shares = (worker.id, worker.num_workers) if worker else (0, 1)
        storage = open_set(self.config, self.index)
        try:
            for start in islice(self.starts, share, None, shares):
                for image in range(start, start + self.micro_batch_size):
                    sample = sample_at(self.seed, image, len(self.index))
                    yield {
                        "__key__": self.index.keys[sample],
                        "data": read_sample(storage, self.index, sample),
                        "image": image,
                        "epoch": image // len(self.index),
                        "sample": sample,
                    }
        finally:
            storage.close()


def open_set(config: DataConfig, index: ShardIndex) -> Storage:
    """The storage of a set of shards, behind a cache if it is remote and one is configured."""
    storage = open_storage(config.shards, retries=config.retries, timeout=config.timeout)
    if config.cache is not None and isinstance(storage, RemoteStorage):
        return CachedStorage(storage, config.cache, index.shards)
    return storage


def read_sample(storage: Storage, index: ShardIndex, sample: int) -> bytes:
    """The image file of one sample, checked. Raises `UserError` if it cannot be had as it was stored."""
    shard = index.shards[index.shard[sample]].name
    offset, length = int(index.offset[sample]), int(index.length[sample])
    try:
        data = storage.read(shard, offset, offset + length)
    except OSError as error:
        raise UserError(
            f"cannot read {storage.describe(shard)} ({error.strerror or 'it is not there'}); "
            "restore it or build the shards again"
        ) from error
    if len(data) != length or crc32(data) != index.crc32[sample]:
        raise UserError(
            f"sample {index.keys[sample]} in {storage.describe(shard)} is damaged; "
            "`hpcm shards verify` lists all damage"
        )
    return data


def prepare(sample: dict, *, crop: int, flip: bool, seed: int) -> dict:
    """Decode one sample and cut its crop."""
    try:
        image = decode(sample["data"])
    except ValueError as error:
        raise UserError(f"sample {sample['__key__']}: {error}; run `hpcm shards verify`") from error
    square, upscaled = cut(image, crop, flip, seed=seed, epoch=sample["epoch"], sample=sample["sample"])
    return {"pixels": torch.from_numpy(to_array(square)), "image": sample["image"], "upscaled": upscaled}


def collate(samples: list[dict]) -> Batch:
    """Samples to a batch."""
    return Batch(
        images=torch.stack([sample["pixels"] for sample in samples]),
        image_index=torch.tensor([sample["image"] for sample in samples]),
        keys=[sample["__key__"] for sample in samples],
        upscaled=sum(sample["upscaled"] for sample in samples),
    )


def hand_over_errors(batches: Iterator[Batch]) -> Iterator[Batch | UserError]:
    """Last stage in a worker: errors travel as items, for torch would bury their one sentence."""
    try:
        yield from batches
    except UserError as error:
        yield error


def start_worker(stop: Connection, _worker: int) -> None:
    """Have a data worker end with its trainer."""
    follow(stop)


def deliver(loader: wds.WebLoader, stop: Connection) -> Iterator[Batch]:
    """Hand out the batches of all workers in order; closing it, or leaving the program, ends the workers."""
    end_workers = partial(stop.send, None)
    try:
        for number, item in enumerate(loader):
            if number == 0:  # the workers have started; they ignore SIGTERM, so Python cannot end them
                atexit.register(end_workers)
            if isinstance(item, UserError):
                raise item
            yield item
    finally:
        atexit.unregister(end_workers)
        end_workers()
