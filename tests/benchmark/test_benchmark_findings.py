"""`hpcm check`: from figures to sentences and tables. The figures are made up; none was measured on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hpcm_scale.files import json_text
from hpcm_scale.preflight.check import all_reduces_table, data_table, devices_table, nodes_table, step_table
from hpcm_scale.preflight.findings import (
    AllReduce,
    Checkpoints,
    Data,
    Device,
    Figures,
    Node,
    Step,
    problems,
    to_json,
)

H100 = "NVIDIA H100 80GB HBM3"
VERSIONS = {"Python": "3.11.7", "torch": "2.13.0+cu130", "CUDA": "13.0", "NCCL": "2.29.1", "driver": "590.10"}


def node(host: str, first: int, **changes) -> Node:
    ranks = [first, first + 1]
    devices = [Device(rank, H100, 80 * 10**9, 5 * 10**8) for rank in ranks]
    facts = {"versions": VERSIONS, "driver_cuda": "13.1", "memory": 1e12, "clock": 0.1, "devices": devices}
    facts |= {"disk": [10**15, 77], "disk_free": 10**13, "disk_writable": True}
    return Node(host, ranks, **facts | changes)


def all_reduce(among: str, gigabytes_per_second: float, processes: int = 2, size: int = 2**28) -> AllReduce:
    return AllReduce(among, processes, size, 2 * (processes - 1) / processes * size / (1e9 * gigabytes_per_second))


FINE = Figures(
    "runs/1b",
    [node("a", 0), node("b", 2)],
    [
        all_reduce("within a", 20, size=2**20),
        all_reduce("within a", 400),
        all_reduce("within b", 390),
        all_reduce("between nodes", 45),
        all_reduce("all processes", 80, processes=4),
    ],
    Data(images=4000.0, bytes=5e8, crops=400.0, workers=4, cores=16, bad=[]),
    Step(
        seconds=0.25,
        images=64,
        loss=60.0,
        peak=33 * 10**9,
        reserved=40 * 10**9,
        estimated_peak=31 * 10**9,
        utilisation=0.4,
        estimated_seconds=0.22,
    ),
    Checkpoints(bytes=12 * 10**9, most=4),
)


def nodes(**changes) -> Figures:
    """With something else on the second node."""
    return replace(FINE, nodes=[FINE.nodes[0], node("b", 2, **changes)])


def step(**changes) -> Figures:
    return replace(FINE, step=replace(FINE.step, **changes))


def data(**changes) -> Figures:
    return replace(FINE, data=replace(FINE.data, **changes))


def slow(among: str, speed: float) -> Figures:
    others = [one for one in FINE.all_reduces if one.among != among]
    return replace(FINE, all_reduces=[*others, all_reduce(among, speed)])


BUSY = [Device(2, H100, 80 * 10**9, 5 * 10**8), Device(3, H100, 80 * 10**9, 12 * 10**9)]
ODD = [Device(2, H100, 80 * 10**9, None), Device(3, "NVIDIA H100 PCIe", 80 * 10**9, None)]
CASES = {
    "a version": (
        nodes(versions=VERSIONS | {"NCCL": "2.27.3"}),
        ["b has NCCL 2.27.3, and a has 2.29.1; install the same version on all nodes"],
    ),
    "no package": (
        nodes(versions=VERSIONS | {"NCCL": None}),
        ["b has NCCL not installed, and a has 2.29.1; install the same version on all nodes"],
    ),
    "an old driver": (
        nodes(driver_cuda="12.8"),
        [
            "the driver of b supports CUDA 12.8, and torch is built for CUDA 13.0; install a newer driver, or a torch "
            "that is built for CUDA 12.8"
        ],
    ),
    "a driver as new as the build": (nodes(driver_cuda="13.0"), []),
    "a clock": (
        nodes(clock=-61.0),
        ["the clock of b is 61 s behind that of a; synchronise the clocks (chrony, ntpd)"],
    ),
    "a device in use": (
        nodes(devices=BUSY),
        ["12.0 GB of the device of rank 3 on b are in use by another program; stop it"],
    ),
    "another device": (
        nodes(devices=ODD),
        [
            f"not all devices are {H100}: rank 3 on b has NVIDIA H100 PCIe; the slowest device limits all of them",
        ],
    ),
    "one slow node": (
        slow("within b", 100),
        [
            "all-reduce within b reaches 100 GB/s, and 400 GB/s within the best node; compare `nvidia-smi topo -m` of "
            "the two"
        ],
    ),
    "a slow network": (
        slow("between nodes", 1.2),
        [
            "all-reduce between nodes reaches 1.2 GB/s, less than a tenth of the 395 GB/s within a node; see with "
            "NCCL_DEBUG=INFO whether NCCL uses the fast network (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)"
        ],
    ),
    "slow storage": (
        data(images=40.0, crops=150.0),
        [
            "the data provides 150 crops/s, and the step needs 256; move the shards to faster storage (data.cache "
            "keeps a local copy of a URL)"
        ],
    ),
    "few workers": (
        data(crops=150.0),
        [
            "the data provides 150 crops/s, and the step needs 256; raise data.workers=4 (there are 16 cores per "
            "process)"
        ],
    ),
    "few cores": (
        data(crops=150.0, cores=4),
        [
            "the data provides 150 crops/s, and the step needs 256; use smaller images, since all cores are in use "
            "(data.workers=4)"
        ],
    ),
    "bad photos": (
        data(bad=["sample x in s.tar is damaged", "sample y in s.tar is damaged"]),
        ["sample x in s.tar is damaged (and 1 more); `hpcm shards verify` lists all damage"],
    ),
    "a loss": (
        step(loss=math.nan),
        ["the loss of the step is nan; check init_from, or lower schedule.learning_rate"],
    ),
    "more memory": (
        step(peak=37 * 10**9),
        [
            "the step takes 37.00 GB of a device, 19% more than the 31.00 GB of `hpcm estimate`; allow for this error "
            "with other settings"
        ],
    ),
    "less memory": (
        step(peak=24 * 10**9),
        [
            "the step takes 24.00 GB of a device, 23% less than the 31.00 GB of `hpcm estimate`; allow for this error "
            "with other settings"
        ],
    ),
    "a full device": (
        step(reserved=79 * 10**9),
        [
            "torch reserves 79.00 GB of the 80.00 GB of a device; lower train.micro_batch_size, or set "
            "engine.activation_checkpointing=blocks, to leave room"
        ],
    ),
    "a slow step": (
        step(seconds=0.6),
        ["the step takes 0.6 s, and 0.22 s by `hpcm estimate`; profile it with train.profile_steps=[20,22]"],
    ),
    "a folder of its own": (
        nodes(disk=[10**15, 78]),
        [
            "run.dir=runs/1b is another folder on b than on a; put it on a file system that all nodes share",
        ],
    ),
    "no permission": (
        nodes(disk_writable=False),
        ["run.dir=runs/1b cannot be written on b; choose another folder"],
    ),
    "little host memory": (
        nodes(memory=5e9),
        ["b has 5.0 GB of memory, and its processes need 6.0 GB for a checkpoint; use more nodes"],
    ),
    "a full disk": (
        replace(FINE, nodes=[node("a", 0, disk_free=30 * 10**9), FINE.nodes[1]]),
        [
            "run.dir=runs/1b has 30.00 GB free, and the run keeps up to 4 checkpoints of 12.00 GB; free some or "
            "choose another folder"
        ],
    ),
}


def test_nothing_is_wrong():
    assert problems(FINE) == []


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_for_each_thing(case):
    figures, expected = CASES[case]
    assert problems(figures) == expected


def test_slow_links_in_all_nodes_are_seen_by_the_data_sheet():
    figures = replace(FINE, all_reduces=[all_reduce("within a", 60), all_reduce("within b", 61)])
    assert problems(figures) == [
        f"all-reduce within a node reaches 61 GB/s, less than half of the 450 GB/s of the links of {H100}; check "
        "`nvidia-smi topo -m` and NCCL_DEBUG=INFO"
    ]


def test_a_driver_of_the_same_major_version_runs_all_but_compiled_kernels():
    versions = VERSIONS | {"CUDA": "13.2"}
    figures = replace(FINE, nodes=[node("a", 0, versions=versions)])
    (sentence,) = problems(figures)
    assert sentence.startswith(
        "the driver of a supports CUDA 13.1, and torch is built for CUDA 13.2 (the same major version"
    )


def test_bus_bandwidth():
    """2(n − 1)/n · bytes / seconds."""
    assert AllReduce("all processes", 4, 10**9, 0.5).bandwidth == 3e9


def test_on_a_cpu_what_is_not_known_is_shown_so_and_is_no_mistake():
    devices = [Device(rank, "cpu", None, None) for rank in (0, 1)]
    versions = {"Python": "3.11.7", "CUDA": None}
    bare = replace(
        FINE,
        nodes=[node("a", 0, devices=devices, versions=versions, driver_cuda=None)],
        all_reduces=[all_reduce("within a", 2)],
        step=replace(FINE.step, peak=None, reserved=None, utilisation=None, estimated_seconds=None),
    )
    assert problems(bare) == []
    assert "| a | 2 | 3.11.7 | none | none |" in nodes_table(bare.nodes)
    assert "| a | ranks 0-1 | cpu | not known | not known |" in devices_table(bare.nodes)
    assert "| MFU | not known |  |" in step_table(bare)
    assert "| device memory (GB) | not known | 31.00 |" in step_table(bare)


def test_the_tables_show_every_figure():
    assert "| b | 2 | 3.11.7 | 2.13.0+cu130 | 13.0 | 2.29.1 | 590.10 | 13.1 |" in nodes_table(FINE.nodes)
    assert f"| b | ranks 2-3 | {H100} | 80.00 | 0.50 |" in devices_table(FINE.nodes)
    assert "| all processes | 4 | 268 | 5.03 | 80 |" in all_reduces_table(FINE.all_reduces)
    assert "| crops, data.workers=4 per process | 400 |  |" in data_table(FINE.data)
    assert "| seconds | 0.25 | 0.22 |" in step_table(FINE)


def test_json_has_bandwidths_and_problems():
    values = to_json(FINE, ["one"])
    assert values["problems"] == ["one"] and values["all_reduces"][1]["bandwidth"] == pytest.approx(400e9)
    assert '"host": "b"' in json_text(values)
