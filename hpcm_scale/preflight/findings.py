"""What `hpcm check` measures, and what of it is wrong: figures to tables and sentences."""

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
"""Clocks may differ by so much; the measurement itself is good to about a second."""
FOREIGN_BYTES = 4 * GB
"""More of a device in use before the model is there belongs to another program; CUDA and NCCL take less."""
SLOW_NODE = 0.5
"""Of the bandwidth within the best node, or of the data sheet."""
SLOW_NETWORK = 0.1
"""Of the bandwidth within a node."""
SLOW_STEP = 2.0
"""Times as long as estimated."""
MEMORY_TOLERANCE = 0.15
FULL = 0.95
"""Of a device's memory: beyond it, little is left for evaluations and fragmentation."""


@dataclass(frozen=True)
class Device:
    """What one process computes on."""

    rank: int
    name: str
    memory: int | None
    """Bytes; None where they are not known."""
    in_use: int | None
    """Bytes of it in use before the model is there."""


@dataclass(frozen=True)
class Node:
    """One machine, as the first of its processes sees it."""

    host: str
    ranks: Sequence[int]
    versions: Mapping[str, str | None]
    """By name; None: not there."""
    driver_cuda: str | None
    """The newest CUDA that the driver supports."""
    memory: float
    """Bytes of the host."""
    clock: float
    """Seconds that its clock is ahead of the first node's."""
    disk: Sequence[int]
    """Of the nearest folder above run.dir that exists: file system's size, inode; alike on nodes that share it."""
    disk_free: int
    """Bytes where run.dir lies."""
    disk_writable: bool
    devices: Sequence[Device] = ()


@dataclass(frozen=True)
class AllReduce:
    """One size of all-reduce among some processes."""

    among: str
    """`within HOST`, `between nodes`, or `all processes`."""
    processes: int
    bytes: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Bus bandwidth, bytes/s: what each process sends in a ring, 2(n − 1)/n · bytes, by the time."""
        return 2 * (self.processes - 1) / self.processes * self.bytes / self.seconds


@dataclass(frozen=True)
class Data:
    """The training data, read by all processes at the same time; a second, all together."""

    photos: float
    """Read from the shards by one reader in each process, and not decoded."""
    bytes: float
    crops: float
    """By data.workers in each process, decoded and cropped."""
    workers: int
    cores: int
    """Of one node, for each of its processes."""
    bad: Sequence[str]
    """What kept photos from being read."""


@dataclass(frozen=True)
class Step:
    """A training step of all processes."""

    seconds: float
    images: int
    """Over all processes."""
    loss: float
    peak: int | None
    """Bytes of device memory in use at the most, of the process that takes most; None on a CPU."""
    reserved: int | None
    """The same with what torch holds back."""
    estimated_peak: int | None
    """By `hpcm estimate`; None where it does not apply."""
    utilisation: float | None
    """Model FLOP/s by the peak of the devices; None where that is not known."""
    estimated_seconds: float | None
    """By `hpcm estimate` at its usual utilisation and the measured bandwidth; None where that is not known."""


@dataclass(frozen=True)
class Checkpoints:
    """What a run writes."""

    bytes: int
    """Of one; each process keeps its share in host memory."""
    most: int
    """That are there at a time."""


@dataclass(frozen=True)
class Figures:
    """All of it."""

    run_dir: str
    nodes: Sequence[Node]
    all_reduces: Sequence[AllReduce]
    data: Data
    step: Step
    checkpoints: Checkpoints


def fastest(figures: Sequence[AllReduce]) -> dict[str, AllReduce]:
    """The size with the highest bandwidth, by the processes among which it is."""
    best: dict[str, AllReduce] = {}
    for one in figures:
        if one.among not in best or one.bandwidth > best[one.among].bandwidth:
            best[one.among] = one
    return best


def sentences(figures: Figures) -> list[str]:
    """One sentence for each thing that is wrong or suspicious."""
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
                f"{others[0].host}{_more(others)} has {name} {theirs or 'missing'}, and {first.host} has "
                f"{here or 'none'}; install the same on all nodes"
            )
    for node in nodes:
        build, driver = node.versions.get("CUDA"), node.driver_cuda
        if build and driver and _number(driver) < _number(build):
            kernels = " (those of the same major version run, but compiled kernels may not)"
            same_major = int(_number(driver)[0]) == int(_number(build)[0])
            yield (
                f"the driver of {node.host} supports CUDA {driver}, and torch is built for CUDA {build}"
                f"{kernels if same_major else ''}; install a newer driver, or a torch that is built for CUDA {driver}"
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
            f"process {device.rank} on {node.host} has {device.name}"
            for node, device in _all(nodes)
            if device.name != usual
        ]
        yield f"not all devices are {usual}: {odd[0]}{_more(odd)}; the slowest one sets the pace of all"
    for node, device in _all(nodes):
        if device.in_use is not None and device.in_use > FOREIGN_BYTES:
            yield (
                f"{device.in_use / GB:.1f} GB of the device of process {device.rank} on {node.host} are in use by "
                "another program; end it"
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
            f"{links.node / GB:.3g} GB/s of the links of {name}; look at `nvidia-smi topo -m` and NCCL_DEBUG=INFO"
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
    if data.photos * max(data.workers, 1) < needed:
        remedy = "the shards are read too slowly for that; bring them nearer (data.cache keeps a copy of a URL)"
    elif data.workers < data.cores:
        remedy = f"raise data.workers={data.workers} (there are {data.cores} cores for each process)"
    else:
        remedy = f"there are no more cores than data.workers={data.workers}; store smaller photos"
    yield f"the data gives {data.crops:,.4g} crops/s, and the step takes {needed:,.4g}; {remedy}"


def _step(figures: Figures) -> Iterator[str]:
    step = figures.step
    if not math.isfinite(step.loss):
        yield f"the loss of the step is {step.loss}; look at init_from, or lower schedule.learning_rate"
    if step.estimated_seconds and step.seconds > SLOW_STEP * step.estimated_seconds:
        yield (
            f"the step takes {step.seconds:.3g} s, and {step.estimated_seconds:.3g} s by `hpcm estimate`; see where "
            "its time goes with train.profile_steps=[20,22]"
        )
    if step.peak is None:
        return
    if step.estimated_peak and abs(step.peak / step.estimated_peak - 1) > MEMORY_TOLERANCE:
        share = step.peak / step.estimated_peak - 1
        yield (
            f"the step takes {step.peak / GB:.2f} GB of a device, {abs(share):.0%} {'more' if share > 0 else 'less'} "
            f"than the {step.estimated_peak / GB:.2f} GB of `hpcm estimate`; do not rely on it for other settings"
        )
    memory = min((device.memory for _, device in _all(figures.nodes) if device.memory), default=None)
    if memory and step.reserved and step.reserved > FULL * memory:
        yield (
            f"torch holds {step.reserved / GB:.2f} GB of the {memory / GB:.2f} GB of a device; lower "
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
            yield f"run.dir={figures.run_dir} cannot be written on {node.host}; mend that, or name another place"
        share = checkpoints.bytes * len(node.ranks) / sum(len(each.ranks) for each in nodes)
        if share > node.memory:
            yield (
                f"{node.host} has {node.memory / GB:.1f} GB of memory, and its processes keep {share / GB:.1f} GB of a "
                "checkpoint there; take more nodes"
            )
    if first.disk_free < checkpoints.most * checkpoints.bytes:
        yield (
            f"run.dir={figures.run_dir} has {first.disk_free / GB:.2f} GB free, and {checkpoints.most} checkpoints of "
            f"{checkpoints.bytes / GB:.2f} GB will be there at a time; free some, or name another place"
        )


def plain(figures: Figures, found: Sequence[str]) -> dict[str, Any]:
    """All of it as JSON values, and what was found to be wrong."""
    bandwidths = [asdict(one) | {"bandwidth": one.bandwidth} for one in figures.all_reduces]
    return asdict(figures) | {"all_reduces": bandwidths, "wrong": list(found)}
