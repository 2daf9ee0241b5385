"""Resumable micro-batches of training crops.

The pipeline is webdataset's; the order of its first stage is our own (`data.mixture`), so that it depends on seed, sets
and weights only. webdataset's own shuffling depends on the numbers of processes and workers.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL
from webdataset.filters import batched
from webdataset.pipeline import DataPipeline

from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data.mixture import Mixture, load_mixture
from hpcm_scale.data.processes import block_stop_signals, follow_parent
from hpcm_scale.data.samples import CorruptSample, Crop, MixtureReader
from hpcm_scale.devices import CUDA, device_kind
from hpcm_scale.errors import UserError, first_line

SHARED_MEMORY = Path("/dev/shm")
"""Where torch's data workers put their batches, on Linux."""
MORE_ROOM = "increase it (docker run --shm-size=8g), lower data.workers or data.prefetch, or set data.workers=0"


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
    """Images that were smaller than the crop and were scaled up."""
    corrupt: list[CorruptSample]
    """Samples that could not be read and were replaced."""

    def pin_memory(self) -> Batch:
        """A copy in pinned memory, for asynchronous transfer to a CUDA device; torch calls it."""
        return replace(self, images=self.images.pin_memory(), image_index=self.image_index.pin_memory())


def check_shared_memory(config: DataConfig, *, micro_batch_size: int, crop: int, processes: int) -> None:
    """Raise UserError if the batches of the data workers of all `processes` of this node do not fit into /dev/shm.

    Each worker keeps `config.prefetch` batches of `micro_batch_size` crops, `crop` pixels wide, ready.
    """
    if not (config.workers and SHARED_MEMORY.is_dir()):
        return
    needed = processes * config.workers * config.prefetch * micro_batch_size * 3 * crop**2
    file_system = os.statvfs(SHARED_MEMORY)
    free = file_system.f_bavail * file_system.f_frsize
    if needed > free:
        raise UserError(
            "shared-memory-too-small",
            "data.workers",
            f"data workers need up to {needed / 1e6:,.0f} MB in {SHARED_MEMORY}, which has {free / 1e6:,.0f} MB free; "
            + MORE_ROOM,
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
    mixture: Mixture | None = None,
    skip: Sequence[range] = (),
) -> Generator[Batch, None, None]:
    """The micro-batches of process `rank`, in order, from global image index `first_image` on.

    Micro-batch j (from 0) of this process holds the global images from first_image +
    (j · world_size + rank) · micro_batch_size on: the batches of `batch_size` images follow each other
    without gaps, for any number of processes and of `config.workers`. Images, their order and their crops are a pure
    function of the seed, the sets and their weights, and `config.crop`, `flip` and `downscale`. Corrupt samples, and
    the global image indices in `skip`, are replaced from the same set (`samples.SampleReader`). With CUDA, the tensors
    are in pinned memory. `close()` ends the workers.

    Args:
        last_image: where the stream ends, whole batches of `batch_size` after `first_image`; None: never.
        batch_size: a multiple of micro_batch_size · world_size.
        mixture: what `load_mixture` returned, if it is open already.

    Raises `UserError` at once if the shards are missing; while iterating if no sample can be read, for mistakes that
    affect every sample, and if a worker is killed.
    """
    assert batch_size % (micro_batch_size * world_size) == 0
    assert last_image is None or (last_image - first_image) % batch_size == 0
    if mixture is None:
        mixture = load_mixture(config)
    stride = micro_batch_size * world_size
    start = first_image + rank * micro_batch_size
    starts = range(start, sys.maxsize if last_image is None else last_image, stride)
    pipeline = DataPipeline(
        CropSource(config, mixture, seed, starts, micro_batch_size, tuple(skip)),
        batched(micro_batch_size, collation_fn=collate, partial=False),
        pass_errors,
    )
    stop_reader, stop_writer = multiprocessing.Pipe(duplex=False)
    loader = DataLoader(
        pipeline,  # pyright: ignore[reportArgumentType]
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        pin_memory=device_kind() == CUDA,
        worker_init_fn=partial(start_worker, stop_reader),
        generator=torch.Generator(),  # its own: the global one belongs to the training loop
    )
    return deliver(loader, stop_writer)


@dataclass
class CropSource:
    """First stage of the pipeline: the crops of this worker's micro-batches, in global order."""

    config: DataConfig
    mixture: Mixture
    seed: int
    starts: range
    """First global image of each micro-batch of this process."""
    micro_batch_size: int
    skip: tuple[range, ...] = ()

    def __call__(self) -> Iterator[Crop]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader = MixtureReader(self.config, self.mixture, self.seed, self.skip)
        try:
            for start in islice(self.starts, number, None, workers):
                for image in range(start, start + self.micro_batch_size):
                    yield reader.crop_at(image)
        finally:
            reader.close()


def collate(crops: list[Crop]) -> Batch:
    """Stack crops to a batch."""
    return Batch(
        images=torch.stack([crop.pixels for crop in crops]),
        image_index=torch.tensor([crop.image for crop in crops]),
        keys=[crop.key for crop in crops],
        upscaled=sum(crop.upscaled for crop in crops),
        corrupt=[sample for crop in crops for sample in crop.corrupt],
    )


def pass_errors(batches: Iterator[Batch]) -> Iterator[Batch | UserError]:
    """Last stage in a worker: UserErrors are passed on as items, because torch wraps exceptions in a traceback.

    Batches are moved to shared memory here: where that is full, torch's own thread drops the batch and the training
    process waits for it forever.
    """
    try:
        for batch in batches:
            if torch.utils.data.get_worker_info():
                share(batch)
            yield batch
    except UserError as error:
        yield error


def share(batch: Batch) -> None:
    """Move the tensors of a batch to shared memory. Raises UserError if it is full."""
    try:
        batch.images.share_memory_()
        batch.image_index.share_memory_()
    except RuntimeError as error:
        raise UserError(
            "shared-memory-full",
            "data.workers",
            f"data workers cannot write their images to shared memory ({first_line(error)}); {MORE_ROOM}",
        ) from error


def start_worker(stop: Connection, _worker: int) -> None:
    """Initialize a data worker: it ends with its training process."""
    follow_parent(stop)


def deliver(loader: DataLoader, stop: Connection) -> Generator[Batch, None, None]:
    """Yield the batches of all workers in order; the workers end on `close()` and at exit."""
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
    except RuntimeError as error:  # from torch, when a worker has exited
        codes = [worker.exitcode for worker in workers if worker.exitcode]
        if not codes:
            raise
        how = f"was killed by signal {-codes[0]}" if codes[0] < 0 else f"exited with code {codes[0]}"
        raise UserError(
            "data-worker-killed",
            "data.workers",
            f"a data worker {how}, probably because memory ran out; lower data.workers or data.prefetch and run the "
            "same command again",
        ) from error
    finally:
        atexit.unregister(end)
        end()


def start_loading(loader: DataLoader) -> tuple[Iterator[Batch | UserError], list[BaseProcess]]:
    """Start the workers of a loader; returns its iterator and the workers."""
    others = set(multiprocessing.active_children())
    on_child = signal.getsignal(signal.SIGCHLD)
    with block_stop_signals():
        items = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's handler raises in the middle of other code when a worker dies; the iterator notices it.
        signal.signal(signal.SIGCHLD, on_child)
    return items, [child for child in multiprocessing.active_children() if child not in others]


def end_loading(stop: Connection, items: Any) -> None:
    """End the pin-memory thread of a loader, which reads from the workers, and then the workers."""
    thread = getattr(items, "_pin_memory_thread", None)
    if thread is not None:  # as torch ends it; torch itself then waits seconds for workers that ignore SIGTERM
        items._pin_memory_thread_done_event.set()
        items._worker_result_queue.put((None, None))  # wakes it
        items._worker_result_queue.cancel_join_thread()
        thread.join(MP_STATUS_CHECK_INTERVAL)
    stop.send(None)
