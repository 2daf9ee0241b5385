"""`hpcm bench data`: crops per second of the training stream, compared with the JPEG decoder alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from bench.codec import synthetic_image
from bench.machine import machine
from bench.report import Report, Table, with_quartiles
from bench.timing import alternate, ratio
from hpcm_scale.compute.hardware import peak_of
from hpcm_scale.config.schema import DataConfig, ModelConfig
from hpcm_scale.data.build import build_shards
from hpcm_scale.data.mixture import Mixture, load_mixture, sample_at
from hpcm_scale.data.processes import follow_parent
from hpcm_scale.data.samples import SampleReader
from hpcm_scale.data.stream import collate, open_stream
from hpcm_scale.errors import UserError
from hpcm_scale.model.parameters import on_meta
from hpcm_scale.tracking.progress import progress
from hpcm_scale.training.costs import training_flops_per_image

DECODER, STREAM = "JPEG decoder", "training stream"
SEED = 0
IMAGES, SIZE, QUALITY = 12, (1632, 1224), 75
"""Number, width and height, and JPEG quality (4:2:0) of the synthetic images."""
GPU, GPU_WORKERS = "H100", 16
"""GPU that the stream should supply, and data workers per GPU."""
CHUNK = 8
"""Images per task of a decoding process: few, so that all processes end at about the same time."""


@dataclass(frozen=True)
class DataSpeed:
    """Speed of stream and decoder on the same images, measured alternately."""

    images: int
    """In the shards."""
    pixels: float
    """Mean per image."""
    bytes: float
    """Mean per image file."""
    crop: int
    workers: int
    batch: int
    crops: int
    """Crops per round; for the decoder, images."""
    seconds: dict[str, list[float]]
    """Wall-clock time of each round, for `DECODER` and `STREAM`."""
    cpu_seconds: dict[str, list[float]]
    """CPU time of each round in one process, which depends little on other jobs of the machine."""

    @property
    def crops_per_worker(self) -> float:
        """Crops per second of one worker of the stream, by the clock."""
        return self.crops / median(self.seconds[STREAM]) / self.workers

    @property
    def crops_per_core(self) -> float:
        """Crops per second of a worker on a core of its own, by CPU time."""
        return self.crops / median(self.cpu_seconds[STREAM])


@dataclass(frozen=True)
class Demand:
    """Crops per second that one GPU needs; computed, not measured."""

    model: str
    utilisation: float
    """Share of the GPU's bf16 peak."""
    crops: float
    """Crops per second."""

    def share(self, speed: DataSpeed) -> float:
        """Share of the crops of `GPU_WORKERS` workers on cores as fast as those measured."""
        return self.crops / (GPU_WORKERS * speed.crops_per_core)


@dataclass(frozen=True)
class Waits:
    """Waiting times of a consumer that takes a batch at fixed intervals."""

    step: float
    """Seconds between receiving a batch and requesting the next."""
    seconds: list[float]
    """Waiting time of each step."""


def make_shards(folder: Path) -> Path:
    """Shards of synthetic 2-megapixel images: coloured noise with about the bits per pixel of natural images."""
    width, height = SIZE
    half = Image.fromarray(synthetic_image(height // 2, width // 2).permute(1, 2, 0).numpy())
    whole = half.resize(SIZE, Image.Resampling.BICUBIC)
    (folder / "images").mkdir(parents=True)
    for number in range(IMAGES):
        piece = Image.new("RGB", SIZE)  # each rolled by a twelfth more, so that the files differ
        for left in (0, -width):
            piece.paste(whole, (left + number * width // IMAGES, 0))
        piece.save(folder / "images" / f"{number:02d}.jpg", quality=QUALITY)
    build_shards([folder / "images"], folder / "shards", min_side=0, shard_size=10**9, workers=1, progress=progress)
    return folder / "shards"


def measure_data(config: DataConfig, batch: int, batches: int, rounds: int) -> DataSpeed:
    """Time the stream of `config.shards` with `config.workers` workers and as many processes that only decode the same
    images, alternating.

    A round has `batches` batches of `batch` crops per worker, after the first batch of each. Besides, both run in this
    process to measure their CPU time. Raises UserError for corrupt samples, and as the stream.
    """
    mixture = load_mixture(config)
    (index,) = mixture.indices
    crops = batch * batches * config.workers
    reader = SampleReader(config, mixture.locations[0], index, SEED)
    try:
        stored = [reader.stored(sample_at(SEED, image, len(index))) for image in range(crops)]
        with ProcessPoolExecutor(config.workers, initializer=_begin, initargs=(stored,)) as pool:
            candidates = {
                DECODER: lambda: _seconds(lambda: list(pool.map(_decode_one, range(crops), chunksize=CHUNK))),
                STREAM: lambda: _stream_seconds(config, mixture, batch, batches),
                f"{DECODER}, CPU": lambda: _seconds(lambda: [_decode(file) for file in stored], time.thread_time),
                f"{STREAM}, CPU": lambda: _seconds(lambda: _crops(reader, batch, crops), time.thread_time),
            }
            samples = alternate(candidates, rounds, torch.device("cpu"), description="data")
    except (OSError, ValueError) as error:
        raise UserError(
            "corrupt-sample",
            "--shards",
            f"a sample of {config.shards} cannot be read ({error}); `hpcm shards verify` lists all damage",
        ) from error
    finally:
        reader.close()
    return DataSpeed(
        images=len(index),
        pixels=index.pixels / len(index),
        bytes=float(index.length.mean()),
        crop=config.crop,
        workers=config.workers,
        batch=batch,
        crops=crops,
        seconds={name: [sample.result for sample in samples[name]] for name in (DECODER, STREAM)},
        cpu_seconds={name: [sample.result for sample in samples[f"{name}, CPU"]] for name in (DECODER, STREAM)},
    )


_files: list[bytes] = []
"""The image files of a decoding process."""


def _begin(files: Sequence[bytes]) -> None:
    follow_parent()
    _files.extend(files)


def _decode_one(number: int) -> None:
    _decode(_files[number])


def _decode(file: bytes) -> None:
    with Image.open(BytesIO(file)) as image:
        image.load()


def _crops(reader: SampleReader, batch: int, count: int) -> None:
    """The work of a data worker."""
    for first in range(0, count, batch):
        collate([reader.crop_at(image) for image in range(first, first + batch)])


def _seconds(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    work()
    return clock() - began


def _stream_seconds(config: DataConfig, mixture: Mixture, batch: int, batches: int) -> float:
    """Time of all batches after the first of each worker; the first ones wait for the workers to start."""
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
        mixture=mixture,
    )


def demand(model: ModelConfig, crop: int, utilisation: float) -> Demand:
    """Crops per second that one GPU needs to train a model at a share of its bf16 peak."""
    flops = training_flops_per_image(on_meta(model), crop)
    return Demand(model.name, utilisation, utilisation * peak_of(f"NVIDIA {GPU}", bf16=True) / flops)


def measure_waits(config: DataConfig, batch: int, step: float, steps: int) -> Waits:
    """Waiting times of a consumer that takes `steps` batches and spends `step` seconds on each, as a GPU would."""
    stream = _open(config, load_mixture(config), batch, steps + config.workers)
    for _ in range(config.workers):
        next(stream)  # wait for the workers to start
    waits = []
    for _ in range(steps):
        time.sleep(step)
        waits.append(_seconds(lambda: next(stream)))
    stream.close()
    return Waits(step, waits)


def data_report(speed: DataSpeed, demands: Sequence[Demand], waits: Waits, source: str) -> Report:
    """Tables and numbers of `hpcm bench data`; `source` describes the images.

    `waits`: of a consumer that takes the same share of these workers' crops as the first of `demands` takes of
    `GPU_WORKERS` workers.
    """
    numbers = {"source": source, **vars(speed), "waits": vars(waits)}
    numbers["demands"] = [vars(each) | {"share": each.share(speed)} for each in demands]
    tables = [_speed_table(speed, source), _demand_table(speed, demands, waits)]
    return Report("data", f"Crops of {speed.crop}² from JPEG shards", machine(torch.device("cpu")), tables, numbers)


def _speed_table(speed: DataSpeed, source: str) -> Table:
    rows = [
        [
            name,
            f"{speed.crops / median(times):,.0f}",
            with_quartiles(ratio(speed.seconds[DECODER], times), 2, "×"),
            f"{1e3 * median(speed.cpu_seconds[name]) / speed.crops:.2f}",
            with_quartiles(ratio(speed.cpu_seconds[DECODER], speed.cpu_seconds[name]), 2, "×"),
        ]
        for name, times in speed.seconds.items()
    ]
    processes = f"{speed.workers} process{'es' * (speed.workers > 1)}"
    notes = [
        f"{source[0].upper()}{source[1:]}: {speed.images:,} of {speed.pixels / 1e6:.2f} megapixels and "
        f"{speed.bytes / 1e3:,.0f} kB on average. {len(speed.seconds[STREAM])} alternating rounds of {speed.crops:,} "
        "images; medians, in brackets the quartiles of the rounds' ratios. Per second: wall-clock time of "
        f"{processes}. CPU time: one process; it depends less on other jobs of the machine.",
        "JPEG decoder: Pillow, whole images from memory. Training stream: from shards on disk to batches of "
        f"{speed.batch} crops in the training process; an image is decoded down to the last row of its crop.",
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
    headings = ["one GPU", "crops/s", "workers needed", f"of {GPU_WORKERS} workers", "MB/s read"]
    notes = [
        f"Computed, not measured: an {GPU} at that share of its bf16 peak, and workers on cores as fast as those here, "
        "by the CPU time above.",
        f"Measured: a consumer that takes a batch of {speed.batch} every {1e3 * waits.step:.0f} ms, "
        f"{100 * demands[0].share(speed):.0f} % of the crops of the {speed.workers} workers here, waited "
        f"{1e3 * median(waits.seconds):.2f} ms per batch in the median and {1e3 * max(waits.seconds):.2f} ms at most, "
        f"over {len(waits.seconds)} batches.",
    ]
    return Table(f"Crops needed by one {GPU}", headings, rows, notes)
