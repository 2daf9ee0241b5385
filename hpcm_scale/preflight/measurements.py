"""Measurements of `hpcm check`; all ranks call each function together."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.cuda.nccl
import torch.distributed

from hpcm_scale.config.schema import DataConfig, ScheduleConfig, TrainConfig
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.data.mixture import Mixture
from hpcm_scale.data.processes import cores
from hpcm_scale.data.samples import MixtureReader
from hpcm_scale.data.stream import Batch
from hpcm_scale.devices import driver_version
from hpcm_scale.distributed.rendezvous import Group
from hpcm_scale.files import is_writable, nearest
from hpcm_scale.preflight.findings import AllReduce, Data, Device, Node
from hpcm_scale.tracking.environment import environment
from hpcm_scale.training.ema import EMA
from hpcm_scale.training.engines.base import Engine
from hpcm_scale.training.optimizer import learning_rate
from hpcm_scale.training.task import Task, batches

SIZES = {"cuda": (2**20, 2**24, 2**28), "cpu": (2**20, 2**24)}
"""Bytes of the all-reduces, by device type."""
WARM_UP, REPEATS = 2, 5
LONGEST_SECONDS = 10.0
"""Larger all-reduces that would take longer are skipped."""
READ_SECONDS, CROP_SECONDS = 3.0, 6.0
WARM_UP_STEPS, STEPS = 2, 3


def hosts_of(group: Group) -> dict[str, list[int]]:
    """Ranks by host."""
    hosts: dict[str, list[int]] = {}
    for rank in group.members:
        hosts.setdefault(rank.host, []).append(rank.rank)
    return hosts


def nodes_of(group: Group, run_dir: Path) -> list[Node]:
    """All nodes on rank 0, an empty list elsewhere; works without torch.distributed, whose versions may differ."""
    hosts = hosts_of(group)
    facts = _node_facts(run_dir) if group.rank in map(min, hosts.values()) else None
    group.compare({})  # all ranks leave it at about the same time
    group.store.set(f"check/{group.rank}", json.dumps([facts, time.time()]))
    group.compare({})
    if group.rank:
        return []
    answers = [json.loads(group.store.get(f"check/{min(ranks)}")) for ranks in hosts.values()]
    return [
        Node(host=host, ranks=ranks, clock=clock - answers[0][1], **facts)
        for (host, ranks), (facts, clock) in zip(hosts.items(), answers, strict=True)
    ]


def _node_facts(run_dir: Path) -> dict[str, Any]:
    found = environment()
    git = found["git"]
    cuda, nccl = torch.version.cuda, torch.distributed.is_nccl_available()
    cudnn = torch.backends.cudnn.version()
    there = nearest(run_dir)
    disk = shutil.disk_usage(there)
    return {
        "versions": {
            "Python": found["python"],
            "hpcm_scale": found["packages"]["hpcm_scale"] + (f" ({git['commit'][:9]})" if git else ""),
            "torch": torch.__version__,
            "deepspeed": found["packages"]["deepspeed"],
            "CUDA": cuda,
            "cuDNN": str(cudnn) if cudnn else None,
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
            "driver": driver_version(),
        },
        "driver_cuda": _driver_cuda() if cuda else None,
        "memory": psutil.virtual_memory().total,
        "disk": [disk.total, there.stat().st_ino],
        "disk_free": disk.free,
        "disk_writable": is_writable(there),
    }


def _driver_cuda() -> str | None:
    """Newest CUDA version that the driver supports, such as 12.4; None without a driver."""
    version = torch._C._cuda_getDriverVersion()  # pyright: ignore[reportAttributeAccessIssue]
    return f"{version // 1000}.{version % 1000 // 10}" if version else None


def device_of(engine: Engine) -> Device:
    """The device of this rank."""
    if engine.device.type != "cuda":
        return Device(engine.rank, engine.device.type, None, None)
    free, total = torch.cuda.mem_get_info(engine.device)
    return Device(engine.rank, torch.cuda.get_device_name(engine.device), total, total - free)


def all_reduces(hosts: Mapping[str, Sequence[int]], engine: Engine, progress: Callable[[], None]) -> list[AllReduce]:
    """All-reduces within every node, between one rank per node, and of all ranks; the same result on all ranks.

    The nodes measure at the same time.
    """
    within = [(f"within {host}", ranks) for host, ranks in hosts.items()]
    between = [("between nodes", [min(ranks) for ranks in hosts.values()])]
    everyone = [("all processes", range(engine.world_size))] if 1 < len(hosts) < engine.world_size else []
    found: list[AllReduce] = []
    for together in (within, between, everyone):
        mine = None
        for among, ranks in together:
            if len(ranks) < 2:
                continue
            group = torch.distributed.new_group(list(ranks))  # collective over all ranks
            if isinstance(group, torch.distributed.ProcessGroup):  # this rank is in it
                mine = among, len(ranks), group
        measured = [(*mine[:2], *timing) for timing in _timings(mine[2], engine.device)] if mine else []
        leads = mine is not None and torch.distributed.get_group_rank(mine[2], engine.rank) == 0
        for of_rank in engine.gather(measured if leads else []):
            found += [AllReduce(*one) for one in of_rank]
        progress()
    return found


def _timings(group: torch.distributed.ProcessGroup, device: torch.device) -> list[tuple[int, float]]:
    """Bytes and median seconds of fp32 all-reduces, the maximum over the ranks of the group."""
    timings: list[tuple[int, float]] = []
    for size in SIZES[device.type]:
        if timings and timings[-1][1] * size / timings[-1][0] * (WARM_UP + REPEATS) > LONGEST_SECONDS:
            break
        reduce = partial(torch.distributed.all_reduce, torch.zeros(size // 4, device=device), group=group)
        times = [_timed(reduce, device)[0] for _ in range(WARM_UP + REPEATS)]
        seconds = torch.tensor([median(times[WARM_UP:])], device=device)
        torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX, group=group)
        timings.append((size, seconds.item()))
    return timings


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """The seconds that `work` takes, including the device's part, and its result."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - began, result


def read_data(data: DataConfig, seed: int, spec: RunSpec, index: Mixture, engine: Engine) -> tuple[Data, list[Batch]]:
    """Read the shards on all ranks at the same time; also the micro-batches of one step of this rank."""
    engine.barrier()
    images, size = _read_images(data, seed, index, engine)
    engine.barrier()
    crops, kept, bad = _read_crops(data, seed, spec, index, engine)
    values = engine.gather([images, size, crops, bad, socket.gethostname(), cores()])
    images, size, crops = (sum(column) for column in zip(*(value[:3] for value in values), strict=True))
    reasons = list(dict.fromkeys(reason for value in values for reason in value[3]))
    here = [numbers for *_, host, numbers in values if host == values[0][4]]
    return Data(images, size, crops, data.workers, len(set.union(*here)) // len(here), reasons), kept


def _read_images(data: DataConfig, seed: int, index: Mixture, engine: Engine) -> tuple[float, float]:
    """Images and bytes per second of one reader, from the middle of the first epoch on, without damaged images."""
    images = MixtureReader(data, index, seed)
    read, size, image = 0, 0, sum(map(len, index.indices)) // 2 + engine.rank
    began = time.perf_counter()
    try:
        while (seconds := time.perf_counter() - began) <= READ_SECONDS:
            number, position = images.order.position_at(image)
            of_set = images.sets[number]
            with suppress(OSError, ValueError):
                size += len(of_set.stored(of_set.order.sample_at(position)))
                read += 1
            image += engine.world_size
        return read / seconds, size / seconds
    finally:
        images.close()


def _read_crops(
    data: DataConfig, seed: int, spec: RunSpec, index: Mixture, engine: Engine
) -> tuple[float, list[Batch], list[str]]:
    """Crops per second of the training stream, micro-batches of one step, and why images could not be read."""
    stream = batches(data, seed, spec, 0, rank=engine.rank, index=index, left_out=())
    with closing(stream):
        kept = [next(stream) for _ in range(spec.accumulation)]
        bad = [image.reason for batch in kept for image in batch.corrupt]
        for _ in range(data.workers):  # prefetched while waiting for the first
            next(stream)
        crops, began = 0, time.perf_counter()
        while True:
            batch = next(stream)
            crops += len(batch.images)
            bad += [image.reason for image in batch.corrupt]
            seconds = time.perf_counter() - began
            if seconds > CROP_SECONDS:
                return crops / seconds, kept, bad


def time_steps(
    train: TrainConfig,
    schedule: ScheduleConfig,
    engine: Engine,
    task: Task,
    kept: Sequence[Batch],
    progress: Callable[[], None],
) -> dict[str, Any]:
    """Median seconds, loss and peak memory of optimizer steps on the same micro-batches.

    The engine must have prepared the task's module.
    """
    ema = EMA(engine, train.ema)
    rate = learning_rate(schedule, 0, train.steps)

    def step() -> float:
        losses = torch.zeros((), device=engine.device)
        for batch in kept:
            loss = task.loss(engine.module, batch, engine.device).loss.mean()
            engine.backward(loss)
            losses += loss.detach() / len(kept)
        loss, norm = engine.reduce(torch.stack([losses, engine.clip()]) / engine.world_size).tolist()
        engine.step(rate, norm)
        ema.update()
        progress()
        return loss

    for _ in range(WARM_UP_STEPS):
        step()
    is_cuda = engine.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(engine.device)
    times, losses = zip(*(_timed(step, engine.device) for _ in range(STEPS)), strict=True)
    return {
        "seconds": median(times),
        "loss": losses[-1],
        "peak": torch.cuda.max_memory_allocated(engine.device) if is_cuda else None,
        "reserved": torch.cuda.max_memory_reserved(engine.device) if is_cuda else None,
    }
