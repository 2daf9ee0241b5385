"""Endless, resumable micro-batches of training crops, through webdataset."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import webdataset as wds
from torch.utils.data import DataLoader
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL

from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data.mixture import Mixture, load_mixture
from hpcm_scale.data.photos import BadPhoto, Crop, MixedPhotos
from hpcm_scale.data.processes import follow, sheltered
from hpcm_scale.devices import CUDA, device_kind
from hpcm_scale.errors import UserError, in_a_line

SHARED_MEMORY = Path("/dev/shm")
"""Where torch's data workers leave their batches, on Linux."""
MORE_ROOM = (
    "give a container more of it (docker run --shm-size=8g), lower data.workers or data.prefetch, or set data.workers=0"
)


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
    bad: list[BadPhoto]
    """Photos that could not be had; others took their places."""

    def pin_memory(self) -> Batch:
        """The same in pinned memory, from where it is copied to a CUDA device while Python goes on; torch calls it."""
        return replace(self, images=self.images.pin_memory(), image_index=self.image_index.pin_memory())


def check_shared_memory(config: DataConfig, *, micro_batch_size: int, crop: int, processes: int) -> None:
    """Raise UserError if the batches of the data workers of all `processes` of this machine do not fit into /dev/shm.

    Each worker keeps `config.prefetch` batches of `micro_batch_size` crops, `crop` pixels wide, ready.
    """
    if not (config.workers and SHARED_MEMORY.is_dir()):
        return
    needed = processes * config.workers * config.prefetch * micro_batch_size * 3 * crop**2
    there = os.statvfs(SHARED_MEMORY)
    free = there.f_bavail * there.f_frsize
    if needed > free:
        raise UserError(
            f"data workers hand over up to {needed / 1e6:,.0f} MB of images in {SHARED_MEMORY}, which has "
            f"{free / 1e6:,.0f} MB free; {MORE_ROOM}"
        )


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
    index: Mixture | None = None,
    left_out: Sequence[range] = (),
) -> Iterator[Batch]:
    """The micro-batches of process `rank`, in order, from global image index `first_image` on.

    Micro-batch j (from 0) of this process holds the global images from first_image +
    (j · world_size + rank) · micro_batch_size on: the batches of `batch_size` images follow each other
    without gaps, whatever the number of processes and of `config.workers`. Images, their order and
    their crops are a pure function of the seed, the sets, and `config.weights`, `crop`, `flip` and `downscale`. The
    places of photos that cannot be had, and of the global image indices in `left_out`, are taken by others of the
    same set, as `photos.Photos` says. Where there is CUDA, the tensors are in pinned memory.

    Ends before global image `last_image`, never if that is None. It is whole batches of `batch_size` after
    `first_image`, and `batch_size` is a multiple of micro_batch_size · world_size. `index` is what
    `load_mixture` read, where it has done so already. Call `close()` on
    the iterator to end its workers. Raises `UserError` at once if the shards are missing, and while
    iterating if no photo can be had, for what no other photo would mend, and if a worker is killed.
    """
    assert batch_size % (micro_batch_size * world_size) == 0
    assert last_image is None or (last_image - first_image) % batch_size == 0
    if index is None:
        index = load_mixture(config)
    stride = micro_batch_size * world_size
    start = first_image + rank * micro_batch_size
    starts = range(start, sys.maxsize if last_image is None else last_image, stride)
    pipeline = wds.DataPipeline(
        Source(config, index, seed, starts, micro_batch_size, tuple(left_out)),
        wds.batched(micro_batch_size, collation_fn=collate, partial=False),
        hand_over_errors,
    )
    stop_here, stop_there = multiprocessing.Pipe(duplex=False)
    loader = DataLoader(
        pipeline,
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        pin_memory=device_kind() == CUDA,
        worker_init_fn=partial(start_worker, stop_here),
        generator=torch.Generator(),  # its own: the global one belongs to the training loop
    )
    return deliver(loader, stop_there)


@dataclass
class Source:
    """First stage: the crops of this worker's micro-batches, in global order."""

    config: DataConfig
    index: Mixture
    seed: int
    starts: range
    """First global image of each micro-batch of this process."""
    micro_batch_size: int
    left_out: tuple[range, ...] = ()

    def __call__(self) -> Iterator[Crop]:
        worker = torch.utils.data.get_worker_info()
        share, shares = (worker.id, worker.num_workers) if worker else (0, 1)
        photos = MixedPhotos(self.config, self.index, self.seed, self.left_out)
        try:
            for start in islice(self.starts, share, None, shares):
                for image in range(start, start + self.micro_batch_size):
                    yield photos.crop_at(image)
        finally:
            photos.close()


def collate(crops: list[Crop]) -> Batch:
    """Crops to a batch."""
    return Batch(
        images=torch.stack([crop.pixels for crop in crops]),
        image_index=torch.tensor([crop.image for crop in crops]),
        keys=[crop.key for crop in crops],
        upscaled=sum(crop.upscaled for crop in crops),
        bad=[photo for crop in crops for photo in crop.bad],
    )


def hand_over_errors(batches: Iterator[Batch]) -> Iterator[Batch | UserError]:
    """Last stage in a worker: errors travel as items, for torch would bury their one sentence.

    Batches are moved to shared memory here: the thread that torch would do it in loses a batch that finds no room, and
    the trainer would wait for it.
    """
    try:
        for batch in batches:
            if torch.utils.data.get_worker_info():
                share(batch)
            yield batch
    except UserError as error:
        yield error


def share(batch: Batch) -> None:
    """Move the tensors of a batch to shared memory. Raises UserError if there is no room."""
    try:
        batch.images.share_memory_()
        batch.image_index.share_memory_()
    except RuntimeError as error:
        raise UserError(f"data workers cannot hand over their images ({in_a_line(error)}); {MORE_ROOM}") from error


def start_worker(stop: Connection, _worker: int) -> None:
    """Have a data worker end with its trainer."""
    follow(stop)


def deliver(loader: DataLoader, stop: Connection) -> Iterator[Batch]:
    """Hand out the batches of all workers in order; closing it, or leaving the program, ends the workers."""
    items: Iterator[Batch | UserError] = iter(())
    workers: list[BaseProcess] = []

    def end() -> None:
        end_loading(stop, items)

    try:
        items, workers = start_loading(loader)
        atexit.register(end)  # the workers ignore SIGTERM, so Python cannot end them
        for item in items:
            if isinstance(item, UserError):
                raise item
            yield item
    except RuntimeError as error:  # of torch, when a worker is gone
        codes = [worker.exitcode for worker in workers if worker.exitcode]
        if not codes:
            raise
        how = f"was killed by signal {-codes[0]}" if codes[0] < 0 else f"ended with exit code {codes[0]}"
        raise UserError(
            f"a data worker {how}, which is most often for want of memory; lower data.workers or data.prefetch, and "
            "the same command goes on"
        ) from error
    finally:
        atexit.unregister(end)
        end()


def start_loading(loader: DataLoader) -> tuple[Iterator[Batch | UserError], list[BaseProcess]]:
    """Start the workers of a loader; returns what iterates over it, and the workers."""
    others = set(multiprocessing.active_children())
    on_child = signal.getsignal(signal.SIGCHLD)
    with sheltered():
        items = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's handler raises wherever the program is when a worker dies; the iterator notices by itself.
        signal.signal(signal.SIGCHLD, on_child)
    return items, [child for child in multiprocessing.active_children() if child not in others]


def end_loading(stop: Connection, items: Iterator[Batch | UserError]) -> None:
    """End the workers of a loader, and before them the thread that pins their batches, which reads what they share."""
    thread = getattr(items, "_pin_memory_thread", None)
    if thread is not None:  # as torch itself ends it, which then ends workers that ignore SIGTERM only after seconds
        items._pin_memory_thread_done_event.set()
        items._worker_result_queue.put((None, None))  # wakes it
        items._worker_result_queue.cancel_join_thread()
        thread.join(MP_STATUS_CHECK_INTERVAL)
    stop.send(None)
