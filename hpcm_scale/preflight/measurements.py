"""The tables of `hpcm check`: Markdown."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed

from hpcm_scale.config.checks import accumulation
from hpcm_scale.config.schema import Config
from hpcm_scale.data.mixture import Mixture
from hpcm_scale.data.photos import MixedPhotos
from hpcm_scale.data.processes import cores
from hpcm_scale.data.stream import Batch
from hpcm_scale.devices import driver_version
from hpcm_scale.distributed.ranks import numbers
from hpcm_scale.distributed.rendezvous import Group
from hpcm_scale.files import nearest, takes_files
from hpcm_scale.formatting import markdown_table
from hpcm_scale.preflight.findings import GB, AllReduce, Data, Device, Figures, Node
from hpcm_scale.tracking.environment import environment
from hpcm_scale.tracking.timing import timed
from hpcm_scale.training.averages import Averages
from hpcm_scale.training.engines.base import Engine
from hpcm_scale.training.optimizer import learning_rate
from hpcm_scale.training.run_folder import run_directory
from hpcm_scale.training.task import Task, batches

# The measurements of `hpcm check`, each called by all processes of a launch.


SIZES = {"cuda": (2**20, 2**24, 2**28), "cpu": (2**20, 2**24)}
"""Bytes of the all-reduces, by kind of device."""
WARM_UP, REPEATS = 2, 5
LONGEST_SECONDS = 10.0
"""No larger all-reduce is tried if it would take longer."""
READ_SECONDS, CROP_SECONDS = 3.0, 6.0
WARM_UP_STEPS, STEPS = 2, 3


def hosts_of(group: Group) -> dict[str, list[int]]:
    """The processes of each node."""
    hosts: dict[str, list[int]] = {}
    for peer in group.peers:
        hosts.setdefault(peer.host, []).append(peer.rank)
    return hosts


def nodes_of(group: Group, config: Config) -> list[Node]:
    """All nodes, on process 0; elsewhere an empty list. Needs no process group of torch: versions may differ."""
    hosts = hosts_of(group)
    facts = _node_facts(run_directory(config)) if group.rank in map(min, hosts.values()) else None
    group.agree({})  # all come out of it at about the same time
    group.store.set(f"check/{group.rank}", json.dumps([facts, time.time()]))
    group.agree({})
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
        "disk_writable": takes_files(there),
    }


def _driver_cuda() -> str | None:
    """The newest CUDA that the driver supports, such as 12.4; None without a driver."""
    version = torch._C._cuda_getDriverVersion()
    return f"{version // 1000}.{version % 1000 // 10}" if version else None


def device_of(engine: Engine) -> Device:
    """What this process computes on."""
    if engine.device.type != "cuda":
        return Device(engine.rank, engine.device.type, None, None)
    free, total = torch.cuda.mem_get_info(engine.device)
    return Device(engine.rank, torch.cuda.get_device_name(engine.device), total, total - free)


def gathered(engine: Engine, value: Any) -> list[Any]:
    """What every process found, in order of rank; plain JSON values."""
    return [json.loads(text) for text in engine.gather(json.dumps(value))]


def all_reduces(hosts: Mapping[str, Sequence[int]], engine: Engine, alive: Callable[[], None]) -> list[AllReduce]:
    """All-reduces within every node, of one process of each node, and of all; none of a process alone.

    All nodes are at work at the same time. The result is the same on all processes.
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
            group = torch.distributed.new_group(list(ranks))  # by all processes, whether they are in it or not
            if engine.rank in ranks:
                mine = among, len(ranks), group
        measured = [(*mine[:2], *timing) for timing in _timings(mine[2], engine.device)] if mine else []
        leads = mine is not None and torch.distributed.get_group_rank(mine[2], engine.rank) == 0
        for of_process in gathered(engine, measured if leads else []):
            found += [AllReduce(*one) for one in of_process]
        alive()
    return found


def _timings(group: torch.distributed.ProcessGroup, device: torch.device) -> list[tuple[int, float]]:
    """Bytes and median seconds of all-reduces of fp32 numbers; the slowest process decides whether there is more."""
    timings: list[tuple[int, float]] = []
    for size in SIZES[device.type]:
        if timings and timings[-1][1] * size / timings[-1][0] * (WARM_UP + REPEATS) > LONGEST_SECONDS:
            break
        reduce = partial(torch.distributed.all_reduce, torch.zeros(size // 4, device=device), group=group)
        turns = [timed(reduce, device) for _ in range(WARM_UP + REPEATS)]
        seconds = torch.tensor([median(turn.seconds for turn in turns[WARM_UP:])], device=device)
        torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX, group=group)
        timings.append((size, seconds.item()))
    return timings


def read_data(config: Config, index: Mixture, engine: Engine) -> tuple[Data, list[Batch]]:
    """Read the shards on all processes at once; what this process has, and the micro-batches of a step."""
    engine.barrier()
    photos, size = _read_photos(config, index, engine)
    engine.barrier()
    crops, kept, bad = _read_crops(config, index, engine)
    values = gathered(engine, [photos, size, crops, bad, socket.gethostname(), sorted(cores())])
    per_second = [sum(column) for column in zip(*(value[:3] for value in values), strict=True)]
    reasons = list(dict.fromkeys(reason for value in values for reason in value[3]))
    here = [set(numbers) for *_, host, numbers in values if host == values[0][4]]
    return Data(*per_second, config.data.workers, len(set.union(*here)) // len(here), reasons), kept


def _read_photos(config: Config, index: Mixture, engine: Engine) -> tuple[float, float]:
    """Photos and bytes a second of one reader, from the middle of the first epoch on; damaged ones are passed over."""
    photos = MixedPhotos(config.data, index, config.train.seed, ())
    read = size = 0
    began = time.perf_counter()
    try:
        for image in count(sum(map(len, index.indices)) // 2 + engine.rank, engine.world_size):
            number, turn = photos.order.turn_at(image)
            of_set = photos.sets[number]
            try:
                size += len(of_set.stored(of_set.order.sample_at(turn)))
                read += 1
            except (OSError, ValueError):
                pass
            seconds = time.perf_counter() - began
            if seconds > READ_SECONDS:
                return read / seconds, size / seconds
    finally:
        photos.close()


def _read_crops(config: Config, index: Mixture, engine: Engine) -> tuple[float, list[Batch], list[str]]:
    """Crops a second of the training's own stream, micro-batches of one step, and what kept photos from being read."""
    rounds = accumulation(config, engine.world_size)
    stream = batches(config, 0, rank=engine.rank, world_size=engine.world_size, index=index, left_out=())
    with closing(stream):
        kept = [next(stream) for _ in range(rounds)]
        bad = [photo.reason for batch in kept for photo in batch.bad]
        for _ in range(config.data.workers):  # what was made while the first one was waited for
            next(stream)
        crops, began = 0, time.perf_counter()
        while True:
            batch = next(stream)
            crops += len(batch.images)
            bad += [photo.reason for photo in batch.bad]
            seconds = time.perf_counter() - began
            if seconds > CROP_SECONDS:
                return crops / seconds, kept, bad


def time_steps(
    config: Config, engine: Engine, task: Task, kept: Sequence[Batch], alive: Callable[[], None]
) -> dict[str, Any]:
    """Whole optimizer steps on the same micro-batches: seconds (median), loss, peak memory; as plain values.

    The engine has prepared the task's module.
    """
    averages = Averages(engine, config.train.ema)
    rate = learning_rate(config.schedule, 0, config.train.steps)

    def step() -> float:
        losses = torch.zeros((), device=engine.device)
        for batch in kept:
            loss = task.loss(engine.module, batch, engine.device).loss.mean()
            engine.backward(loss)
            losses += loss.detach() / len(kept)
        loss, norm = engine.reduce(torch.stack([losses, engine.clip()]) / engine.world_size).tolist()
        engine.step(rate, norm)
        averages.update()
        alive()
        return loss

    for _ in range(WARM_UP_STEPS):
        step()
    is_cuda = engine.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(engine.device)
    turns = [timed(step, engine.device) for _ in range(STEPS)]
    return {
        "seconds": median(turn.seconds for turn in turns),
        "loss": turns[-1].result,
        "peak": torch.cuda.max_memory_allocated(engine.device) if is_cuda else None,
        "reserved": torch.cuda.max_memory_reserved(engine.device) if is_cuda else None,
    }


NOT_KNOWN = "not known"


def nodes_table(nodes: Sequence[Node]) -> str:
    """Versions and drivers, one node a line."""
    names = list(nodes[0].versions)
    rows = [
        [
            node.host,
            str(len(node.ranks)),
            *(node.versions.get(name) or "none" for name in names),
            node.driver_cuda or "none",
        ]
        for node in nodes
    ]
    headings = ["node", "processes", *names, "driver's CUDA"]
    return markdown_table(headings, rows, words=len(headings))


def devices_table(nodes: Sequence[Node]) -> str:
    """Who computes on what; processes of one node with the same device share a line."""
    rows = []
    for node in nodes:
        for name in dict.fromkeys(device.name for device in node.devices):
            alike = [device for device in node.devices if device.name == name]
            memory = min((device.memory for device in alike if device.memory is not None), default=None)
            in_use = max((device.in_use for device in alike if device.in_use is not None), default=None)
            ranks = numbers([device.rank for device in alike])
            rows.append([node.host, ranks, name, _gigabytes(memory), _gigabytes(in_use)])
    return markdown_table(["node", "processes", "device", "memory (GB)", "in use before (GB)"], rows, words=3)


def all_reduces_table(all_reduces: Sequence[AllReduce]) -> str:
    """Bus bandwidths by size."""
    rows = [
        [
            one.among,
            str(one.processes),
            f"{one.bytes / 1e6:,.3g}",
            f"{one.seconds * 1e3:,.3g}",
            f"{one.bandwidth / GB:,.3g}",
        ]
        for one in all_reduces
    ]
    return markdown_table(["all-reduce", "processes", "MB", "ms", "GB/s"], rows)


def data_table(data: Data) -> str:
    """What the shards give."""
    rows = [
        ["photos read, one reader in each process", f"{data.photos:,.4g}", f"{data.bytes / 1e6:,.4g}"],
        [f"crops, data.workers={data.workers} in each process", f"{data.crops:,.4g}", ""],
    ]
    return markdown_table(["data, all processes together", "per second", "MB/s"], rows)


def step_table(figures: Figures) -> str:
    """The step against its estimate, and the disk against the checkpoints."""
    step, checkpoints = figures.step, figures.checkpoints
    utilisation = NOT_KNOWN if step.utilisation is None else f"{step.utilisation:.1%}"
    estimated = NOT_KNOWN if step.estimated_seconds is None else f"{step.estimated_seconds:,.4g}"
    rows = [
        ["seconds", f"{step.seconds:,.4g}", estimated],
        ["utilisation of the devices' peak", utilisation, ""],
        ["crops per second", f"{step.images / step.seconds:,.4g}", ""],
        ["device memory (GB)", _gigabytes(step.peak), _gigabytes(step.estimated_peak)],
        ["device memory that torch holds (GB)", _gigabytes(step.reserved), ""],
        ["free where run.dir lies (GB)", f"{figures.nodes[0].disk_free / GB:,.2f}", ""],
        [f"{checkpoints.most} checkpoints (GB)", "", f"{checkpoints.most * checkpoints.bytes / GB:,.2f}"],
    ]
    return markdown_table([f"a step of {step.images} images", "measured", "estimated"], rows)


def _gigabytes(size: float | None) -> str:
    return NOT_KNOWN if size is None else f"{size / GB:,.2f}"
