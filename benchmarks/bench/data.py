"""`hpcm bench data`: crops a second of the training stream against the JPEG decoder alone on the same cores."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.codec import picture
from bench.machine import machine
from bench.report import Report, Table, with_quartiles
from hpcm_scale.compute.hardware import peak_of
from hpcm_scale.config.schema import DataConfig, ModelConfig
from hpcm_scale.data.build import build_shards
from hpcm_scale.data.mixture import Mixture, load_mixture, sample_at
from hpcm_scale.data.photos import Photos
from hpcm_scale.data.processes import follow
from hpcm_scale.data.stream import collate, open_stream
from hpcm_scale.errors import UserError
from hpcm_scale.model.parameters import on_meta
from hpcm_scale.tracking.progress import progress
from hpcm_scale.tracking.timing import alternate, ratio, spread
from hpcm_scale.training.costs import training_flops_per_image

DECODER, STREAM = "decoder alone", "stream of crops"
SEED = 0
MADE, MADE_SIZE, MADE_QUALITY = 12, (1632, 1224), 75
"""Number, width and height, and JPEG quality (4:2:0) of the pictures that stand in for photos."""
GPU, GPU_WORKERS = "H100", 16
"""Whose steps the stream is to keep up with, and data workers beside one."""
CHUNK = 8
"""Photos handed to a process that only decodes at a time: few enough that all processes end together."""


@dataclass(frozen=True)
class DataSpeed:
    """The stream and the decoder over the same photos, in turns."""

    photos: int
    """In the shards."""
    pixels: float
    """Of a photo, in the mean."""
    bytes: float
    """Of a photo's file, in the mean."""
    crop: int
    workers: int
    batch: int
    crops: int
    """Whose time counts in a round; for the decoder, photos."""
    seconds: dict[str, list[float]]
    """By the clock, of each round, by `DECODER` and `STREAM`."""
    cpu_seconds: dict[str, list[float]]
    """Of one core for as many photos in one process, which other programs on the machine lengthen little."""

    @property
    def crops_per_worker(self) -> float:
        """Crops a second of one worker of the stream, as it went here."""
        return self.crops / spread(self.seconds[STREAM]).median / self.workers

    @property
    def crops_per_core(self) -> float:
        """Crops a second of a worker that has a core for itself."""
        return self.crops / spread(self.cpu_seconds[STREAM]).median


@dataclass(frozen=True)
class Demand:
    """What one GPU takes of a stream; computed, not measured."""

    model: str
    utilisation: float
    """Of the GPU's bf16 peak."""
    crops: float
    """A second."""

    def share(self, speed: DataSpeed) -> float:
        """Of what `GPU_WORKERS` workers give that have cores as fast as those here."""
        return self.crops / (GPU_WORKERS * speed.crops_per_core)


@dataclass(frozen=True)
class Waits:
    """What a consumer waited for that asks for a batch at fixed intervals."""

    step: float
    """Seconds between getting a batch and asking for the next."""
    seconds: list[float]
    """Waited in each step."""


def make_shards(folder: Path) -> Path:
    """Shards of made 2-megapixel pictures: soft coloured noise, as many bits per pixel as photos have."""
    width, height = MADE_SIZE
    half = Image.fromarray(picture(height // 2, width // 2).permute(1, 2, 0).numpy())
    whole = half.resize(MADE_SIZE, Image.Resampling.BICUBIC)
    (folder / "pictures").mkdir(parents=True)
    for number in range(MADE):
        piece = Image.new("RGB", MADE_SIZE)  # rolled by a twelfth each, so that no two files are alike
        for left in (0, -width):
            piece.paste(whole, (left + number * width // MADE, 0))
        piece.save(folder / "pictures" / f"{number:02d}.jpg", quality=MADE_QUALITY)
    build_shards([folder / "pictures"], folder / "shards", min_side=0, shard_size=10**9, workers=1, progress=progress)
    return folder / "shards"


def measure_data(config: DataConfig, batch: int, batches: int, rounds: int) -> DataSpeed:
    """Read crops from `config.shards` with `config.workers` workers, and decode the same photos wholly with as many
    processes that do nothing else, in turns.

    A round counts `batches` batches of `batch` crops of every worker, after the first of each. In other turns both
    are done in this process, and the time of its core is taken. Raises UserError for
    photos that cannot be had, and as the stream does.
    """
    mixture = load_mixture(config)
    (index,) = mixture.indices
    crops = batch * batches * config.workers
    photos = Photos(config, index, SEED, ())
    try:
        stored = [photos.stored(sample_at(SEED, image, len(index))) for image in range(crops)]
        with ProcessPoolExecutor(config.workers, initializer=_begin, initargs=(stored,)) as pool:
            contestants = {
                DECODER: lambda: _seconds(lambda: list(pool.map(_decode_one, range(crops), chunksize=CHUNK))),
                STREAM: lambda: _stream_seconds(config, mixture, batch, batches),
                f"{DECODER}, CPU": lambda: _seconds(lambda: [_decode(file) for file in stored], time.thread_time),
                f"{STREAM}, CPU": lambda: _seconds(lambda: _crops(photos, batch, crops), time.thread_time),
            }
            turns = alternate(contestants, rounds, torch.device("cpu"), description="data")
    except (OSError, ValueError) as error:
        raise UserError(
            f"a photo of the shards at {config.shards} cannot be had ({error}); `hpcm shards verify` lists all damage"
        ) from error
    finally:
        photos.close()
    return DataSpeed(
        photos=len(index),
        pixels=index.pixels / len(index),
        bytes=float(index.length.mean()),
        crop=config.crop,
        workers=config.workers,
        batch=batch,
        crops=crops,
        seconds={name: [turn.result for turn in turns[name]] for name in (DECODER, STREAM)},
        cpu_seconds={name: [turn.result for turn in turns[f"{name}, CPU"]] for name in (DECODER, STREAM)},
    )


_files: list[bytes] = []
"""In a process that only decodes: what it decodes."""


def _begin(files: Sequence[bytes]) -> None:
    follow()
    _files.extend(files)


def _decode_one(number: int) -> None:
    _decode(_files[number])


def _decode(file: bytes) -> None:
    with Image.open(BytesIO(file)) as image:
        image.load()


def _crops(photos: Photos, batch: int, count: int) -> None:
    """What a worker does."""
    for first in range(0, count, batch):
        collate([photos.crop_at(image) for image in range(first, first + batch)])


def _seconds(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    work()
    return clock() - began


def _stream_seconds(config: DataConfig, mixture: Mixture, batch: int, batches: int) -> float:
    """The time of all batches after the first of each worker, with which the workers have begun."""
    stream = _open(config, mixture, batch, (batches + 1) * config.workers)
    for _ in range(config.workers):
        next(stream)
    return _seconds(lambda: list(stream))


def _open(config: DataConfig, mixture: Mixture, batch: int, batches: int):
    return open_stream(
        config,
        seed=SEED,
        first_image=0,
        last_image=batch * batches,
        batch_size=batch,
        micro_batch_size=batch,
        rank=0,
        world_size=1,
        index=mixture,
    )


def demand(model: ModelConfig, crop: int, utilisation: float) -> Demand:
    """Crops a second that one GPU takes which trains a model at some share of its bf16 peak."""
    flops = training_flops_per_image(on_meta(model), crop)
    return Demand(model.name, utilisation, utilisation * peak_of(f"NVIDIA {GPU}", bf16=True) / flops)


def measure_waits(config: DataConfig, batch: int, step: float, steps: int) -> Waits:
    """Let a consumer take `steps` batches that it spends `step` seconds on each, as a GPU would."""
    stream = _open(config, load_mixture(config), batch, steps + config.workers)
    for _ in range(config.workers):
        next(stream)  # the workers have begun
    waits = []
    for _ in range(steps):
        time.sleep(step)
        waits.append(_seconds(lambda: next(stream)))
    stream.close()
    return Waits(step, waits)


def data_report(speed: DataSpeed, demands: Sequence[Demand], waits: Waits, source: str) -> Report:
    """Tables and numbers of `hpcm bench data`; `source` says what the photos are.

    `waits` are those of a consumer that takes as large a share of these workers' speed as the first of `demands` is of
    the speed of so many beside a GPU.
    """
    numbers = {"source": source, **vars(speed), "waits": vars(waits)}
    numbers["demands"] = [vars(each) | {"share": each.share(speed)} for each in demands]
    tables = [_speed_table(speed, source), _demand_table(speed, demands, waits)]
    return Report("data", f"Crops of {speed.crop}² from JPEG shards", machine(torch.device("cpu")), tables, numbers)


def _speed_table(speed: DataSpeed, source: str) -> Table:
    rows = [
        [
            name,
            f"{speed.crops / spread(times).median:,.0f}",
            with_quartiles(ratio(speed.seconds[DECODER], times), 2, "×"),
            f"{1e3 * spread(speed.cpu_seconds[name]).median / speed.crops:.2f}",
            with_quartiles(ratio(speed.cpu_seconds[DECODER], speed.cpu_seconds[name]), 2, "×"),
        ]
        for name, times in speed.seconds.items()
    ]
    processes = f"{speed.workers} process{'es' * (speed.workers > 1)}"
    notes = [
        f"{source}: {speed.photos:,} photos of {speed.pixels / 1e6:.2f} megapixels and {speed.bytes / 1e3:,.0f} kB in "
        f"the mean. {len(speed.seconds[STREAM])} rounds in turns of {speed.crops:,} photos each; medians, and in "
        f"brackets the quartiles of the rounds' ratios. Per second: {processes}, by the clock. CPU time: one process, "
        "the time that its core worked, which says more where other programs run.",
        "The decoder alone: Pillow, all of every photo, from memory. The stream: from shards on disk to batches of "
        f"{speed.batch} crops in the training process; it decodes a photo no further than down to the last row of its "
        "crop.",
    ]
    return Table("Speed", ["", "per second", "times as fast", "CPU ms each", "times as fast"], rows, notes)


def _demand_table(speed: DataSpeed, demands: Sequence[Demand], waits: Waits) -> Table:
    rows = [
        [
            f"{each.model} at {100 * each.utilisation:.0f} %",
            f"{each.crops:,.0f}",
            f"{each.crops / speed.crops_per_core:.1f}",
            f"{100 * each.share(speed):.0f} %",
            f"{each.crops * speed.bytes / 1e6:,.0f}",
        ]
        for each in demands
    ]
    headings = ["one GPU", "crops/s", "workers it takes", f"of {GPU_WORKERS} workers", "MB/s read"]
    notes = [
        f"Computed, not measured: an {GPU} that reaches that share of its bf16 peak, and workers with cores as fast as "
        "those here, by the CPU time above.",
        f"Measured here: a consumer that takes a batch of {speed.batch} every {1e3 * waits.step:.0f} ms, "
        f"{100 * demands[0].share(speed):.0f} % of what the {speed.workers} here gave by the clock, waited for one "
        f"{1e3 * spread(waits.seconds).median:.2f} ms in the median and {1e3 * max(waits.seconds):.2f} ms at most, "
        f"over {len(waits.seconds)} batches.",
    ]
    return Table(f"What one {GPU} takes", headings, rows, notes)
