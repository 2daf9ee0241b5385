"""Measured figures of `hpcm check`, and the problems that follow from them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from hpcm_scale.compute.hardware import links_of

GB = 1e9
CLOCK_SECONDS = 5.0
"""Tolerated difference of clocks; it is measured to about a second."""
FOREIGN_BYTES = 4 * GB
"""Memory in use before the model is created that belongs to another program; CUDA and NCCL take less."""
SLOW_NODE = 0.5
"""Fraction of the bandwidth within the best node, or of the data sheet."""
SLOW_NETWORK = 0.1
"""Fraction of the bandwidth within a node."""
SLOW_STEP = 2.0
"""Multiple of the estimated time."""
MEMORY_TOLERANCE = 0.15
FULL = 0.95
"""Fraction of a device's memory; the rest is needed for evaluations and fragmentation."""


@dataclass(frozen=True)
class Device:
    """Device of one rank."""

    rank: int
    name: str
    memory: int | None
    """Bytes; None if unknown."""
    in_use: int | None
    """Bytes in use before the model is created."""


@dataclass(frozen=True)
class Node:
    """One node, described by its first rank."""

    host: str
    ranks: Sequence[int]
    versions: Mapping[str, str | None]
    """By name; None if not installed."""
    driver_cuda: str | None
    """Newest CUDA version that the driver supports."""
    memory: float
    """Bytes of host memory."""
    clock: float
    """Seconds by which its clock is ahead of that of the first node."""
    disk: Sequence[int]
    """Size of the file system and inode of the nearest existing folder of run.dir; equal on nodes that share it."""
    disk_free: int
    """Bytes free for run.dir."""
    disk_writable: bool
    devices: Sequence[Device] = ()


@dataclass(frozen=True)
class AllReduce:
    """All-reduce of one size among some ranks."""

    among: str
    """`within HOST`, `between nodes`, or `all processes`."""
    processes: int
    bytes: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Bus bandwidth in bytes/s: 2(n − 1)/n · bytes, which each of n ranks sends in a ring, per time."""
        return 2 * (self.processes - 1) / self.processes * self.bytes / self.seconds


@dataclass(frozen=True)
class Data:
    """Throughput of the training data: sums over all ranks, which read at the same time, per second."""

    images: float
    """Read by one reader per rank, without decoding."""
    bytes: float
    crops: float
    """Decoded and cropped by data.workers per rank."""
    workers: int
    cores: int
    """Cores per rank of one node."""
    bad: Sequence[str]
    """Why images could not be read."""


@dataclass(frozen=True)
class Step:
    """One training step of all ranks."""

    seconds: float
    images: int
    """Batch size over all ranks."""
    loss: float
    peak: int | None
    """Peak bytes of allocated device memory, maximum over ranks; None on a CPU."""
    reserved: int | None
    """Peak bytes that torch has reserved."""
    estimated_peak: int | None
    """Bytes by `hpcm estimate`; None if it does not apply."""
    utilisation: float | None
    """MFU; None if the peak of the devices is unknown."""
    estimated_seconds: float | None
    """By `hpcm estimate` from the measured bandwidth; None if the peak of the devices is unknown."""


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of a run."""

    bytes: int
    """Of one checkpoint; each rank keeps its share in host memory."""
    most: int
    """Largest number on disk at a time."""


@dataclass(frozen=True)
class Figures:
    """All figures of a check."""

    run_dir: str
    nodes: Sequence[Node]
    all_reduces: Sequence[AllReduce]
    data: Data
    step: Step
    checkpoints: Checkpoints


def fastest(figures: Sequence[AllReduce]) -> dict[str, AllReduce]:
    """The all-reduce of highest bandwidth for each set of ranks."""
    best: dict[str, AllReduce] = {}
    for one in figures:
        if one.among not in best or one.bandwidth > best[one.among].bandwidth:
            best[one.among] = one
    return best


def problems(figures: Figures) -> list[str]:
    """One sentence per problem, with a remedy."""
    return [
        *_versions(figures.nodes),
        *_clocks(figures.nodes),
        *_devices(figures.nodes),
        *_bandwidths(figures),
        *_data(figures),
        *_step(figures),
        *_disks(figures),
    ]


def _versions(nodes: Sequence[Node]) -> Iterator[str]:
    first = nodes[0]
    for name in first.versions:
        here = first.versions[name]
        others = [node for node in nodes if node.versions.get(name) != here]
        if others:
            theirs = others[0].versions.get(name)
            yield (
                f"{others[0].host}{_more(others)} has {name} {theirs or 'not installed'}, and {first.host} has "
                f"{here or 'not installed'}; install the same version on all nodes"
            )
    for node in nodes:
        build, driver = node.versions.get("CUDA"), node.driver_cuda
        if build and driver and _number(driver) < _number(build):
            same_major = _number(driver)[0] == _number(build)[0]
            note = " (the same major version, but compiled kernels may fail)" if same_major else ""
            yield (
                f"the driver of {node.host} supports CUDA {driver}, and torch is built for CUDA {build}{note}; install "
                f"a newer driver, or a torch that is built for CUDA {driver}"
            )


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _clocks(nodes: Sequence[Node]) -> Iterator[str]:
    for node in nodes:
        if abs(node.clock) > CLOCK_SECONDS:
            where = "ahead of" if node.clock > 0 else "behind"
            yield (
                f"the clock of {node.host} is {abs(node.clock):,.0f} s {where} that of {nodes[0].host}; synchronise "
                "the clocks (chrony, ntpd)"
            )


def _devices(nodes: Sequence[Node]) -> Iterator[str]:
    counts = Counter(device.name for node in nodes for device in node.devices)
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        odd = [
            f"rank {device.rank} on {node.host} has {device.name}"
            for node, device in _all(nodes)
            if device.name != usual
        ]
        yield f"not all devices are {usual}: {odd[0]}{_more(odd)}; the slowest device limits all of them"
    for node, device in _all(nodes):
        if device.in_use is not None and device.in_use > FOREIGN_BYTES:
            yield (
                f"{device.in_use / GB:.1f} GB of the device of rank {device.rank} on {node.host} are in use by "
                "another program; stop it"
            )


def _all(nodes: Sequence[Node]) -> list[tuple[Node, Device]]:
    return [(node, device) for node in nodes for device in node.devices]


def _more(listed: Sequence[Any]) -> str:
    return f" (and {len(listed) - 1} more)" if len(listed) > 1 else ""


def _bandwidths(figures: Figures) -> Iterator[str]:
    best = fastest(figures.all_reduces)
    within = {name: one.bandwidth for name, one in best.items() if name.startswith("within ")}
    for name, bandwidth in within.items():
        if bandwidth < SLOW_NODE * max(within.values()):
            yield (
                f"all-reduce {name} reaches {bandwidth / GB:.3g} GB/s, and {max(within.values()) / GB:.3g} GB/s within "
                "the best node; compare `nvidia-smi topo -m` of the two"
            )
    name = figures.nodes[0].devices[0].name if figures.nodes[0].devices else ""
    links = links_of(name)
    if within and links and max(within.values()) < SLOW_NODE * links.node:
        yield (
            f"all-reduce within a node reaches {max(within.values()) / GB:.3g} GB/s, less than half of the "
            f"{links.node / GB:.3g} GB/s of the links of {name}; check `nvidia-smi topo -m` and NCCL_DEBUG=INFO"
        )
    between = best.get("between nodes")
    if between and within and between.bandwidth < SLOW_NETWORK * median(within.values()):
        yield (
            f"all-reduce between nodes reaches {between.bandwidth / GB:.3g} GB/s, less than a tenth of the "
            f"{median(within.values()) / GB:.3g} GB/s within a node; see with NCCL_DEBUG=INFO whether NCCL uses the "
            "fast network (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)"
        )


def _data(figures: Figures) -> Iterator[str]:
    data, step = figures.data, figures.step
    if data.bad:
        yield f"{data.bad[0]}{_more(data.bad)}; `hpcm shards verify` lists all damage"
    needed = step.images / step.seconds
    if data.crops >= needed:
        return
    if data.images * max(data.workers, 1) < needed:
        remedy = "move the shards to faster storage (data.cache keeps a local copy of a URL)"
    elif data.workers < data.cores:
        remedy = f"raise data.workers={data.workers} (there are {data.cores} cores per process)"
    else:
        remedy = f"use smaller images, since all cores are in use (data.workers={data.workers})"
    yield f"the data provides {data.crops:,.4g} crops/s, and the step needs {needed:,.4g}; {remedy}"


def _step(figures: Figures) -> Iterator[str]:
    step = figures.step
    if not math.isfinite(step.loss):
        yield f"the loss of the step is {step.loss}; check init_from, or lower schedule.learning_rate"
    if step.estimated_seconds and step.seconds > SLOW_STEP * step.estimated_seconds:
        yield (
            f"the step takes {step.seconds:.3g} s, and {step.estimated_seconds:.3g} s by `hpcm estimate`; profile it "
            "with train.profile_steps=[20,22]"
        )
    if step.peak is None:
        return
    if step.estimated_peak and abs(step.peak / step.estimated_peak - 1) > MEMORY_TOLERANCE:
        share = step.peak / step.estimated_peak - 1
        yield (
            f"the step takes {step.peak / GB:.2f} GB of a device, {abs(share):.0%} {'more' if share > 0 else 'less'} "
            f"than the {step.estimated_peak / GB:.2f} GB of `hpcm estimate`; allow for this error with other settings"
        )
    memory = min((device.memory for _, device in _all(figures.nodes) if device.memory), default=None)
    if memory and step.reserved and step.reserved > FULL * memory:
        yield (
            f"torch reserves {step.reserved / GB:.2f} GB of the {memory / GB:.2f} GB of a device; lower "
            "train.micro_batch_size, or set engine.activation_checkpointing=blocks, to leave room"
        )


def _disks(figures: Figures) -> Iterator[str]:
    nodes, checkpoints = figures.nodes, figures.checkpoints
    first = nodes[0]
    others = [node.host for node in nodes if node.disk != first.disk]
    if others:
        yield (
            f"run.dir={figures.run_dir} is another folder on {others[0]}{_more(others)} than on {first.host}; put it "
            "on a file system that all nodes share"
        )
    for node in nodes:
        if not node.disk_writable:
            yield f"run.dir={figures.run_dir} cannot be written on {node.host}; choose another folder"
        share = checkpoints.bytes * len(node.ranks) / sum(len(each.ranks) for each in nodes)
        if share > node.memory:
            yield (
                f"{node.host} has {node.memory / GB:.1f} GB of memory, and its processes need {share / GB:.1f} GB for "
                "a checkpoint; use more nodes"
            )
    if first.disk_free < checkpoints.most * checkpoints.bytes:
        yield (
            f"run.dir={figures.run_dir} has {first.disk_free / GB:.2f} GB free, and the run keeps up to "
            f"{checkpoints.most} checkpoints of {checkpoints.bytes / GB:.2f} GB; free some or choose another folder"
        )


def to_json(figures: Figures, found: Sequence[str]) -> dict[str, Any]:
    """All figures and the problems as JSON values."""
    bandwidths = [asdict(one) | {"bandwidth": one.bandwidth} for one in figures.all_reduces]
    return asdict(figures) | {"all_reduces": bandwidths, "problems": list(found)}
