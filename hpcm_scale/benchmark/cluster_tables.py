"""The tables of `hpcm check`: Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from hpcm_scale.benchmark.findings import GB, AllReduce, Data, Figures, Node
from hpcm_scale.markdown import markdown_table
from hpcm_scale.training.group.peers import numbers

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
