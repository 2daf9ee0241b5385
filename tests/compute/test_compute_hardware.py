"""Peak rates by the names that drivers report."""

from __future__ import annotations

import pytest
import torch

from hpcm_scale.compute.hardware import Links, links_of, peak_flops, peak_of

# TFLOP/s, fp32 (TF32 off) and bf16, dense: half of what data sheets print "with sparsity".
KNOWN = {
    "NVIDIA B200": (75, 2250),
    "NVIDIA GB200": (80, 2500),
    "NVIDIA GH200 480GB": (67, 989),
    "NVIDIA H20": (44, 148),
    "NVIDIA H800": (67, 989),
    "AMD Instinct MI300X": (163.4, 1307.4),
    "NVIDIA H100 80GB HBM3": (67, 989),
    "NVIDIA H100 PCIe": (51, 756),
    "NVIDIA H100 NVL": (60, 835),
    "NVIDIA H200": (67, 989),
    "NVIDIA H200 NVL": (60, 835),
    "NVIDIA A100-SXM4-80GB": (19.5, 312),
    "NVIDIA A100-SXM4-40GB": (19.5, 312),
    "A100-PCIE-40GB": (19.5, 312),
    "NVIDIA A100 80GB PCIe": (19.5, 312),
    "NVIDIA L40S": (91.6, 362),
    "NVIDIA GeForce RTX 4090": (82.6, 165.2),
    "NVIDIA GeForce RTX 3090": (35.6, 71.2),
    "H100": (67, 989),
    "A100": (19.5, 312),
}
# Slower, faster or other than a known one: no figure is better than a false one.
UNKNOWN = [
    "NVIDIA RTX A4000",
    "NVIDIA RTX A6000",
    "NVIDIA A40",
    "NVIDIA A100X",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "NVIDIA H800 PCIe",
    "NVIDIA H200 MIG 1g.18gb",
    "NVIDIA B200 MIG 1g.23gb",
    "NVIDIA L40",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 3090 Ti",
    "Tesla V100-SXM2-16GB",
    "AMD Instinct MI300A",
    "",
]


@pytest.mark.parametrize("name", KNOWN)
def test_known(name):
    assert (peak_of(name, bf16=False), peak_of(name, bf16=True)) == tuple(1e12 * rate for rate in KNOWN[name])


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name):
    assert peak_of(name, bf16=False) is None
    assert peak_of(name, bf16=True) is None


@pytest.mark.parametrize(
    ("name", "links"),
    [
        ("H100", Links(450e9, 400e9)),
        ("NVIDIA H100 80GB HBM3", Links(450e9, 400e9)),
        ("NVIDIA H200", Links(450e9, 400e9)),
        ("NVIDIA A100-SXM4-80GB", Links(300e9, 200e9)),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_links_of_machines_with_a_switch(name, links):
    assert links_of(name) == links


def test_a_ring_is_as_fast_as_its_slowest_link():
    links = Links(node=450e9, network=50e9)
    assert links.ring(processes=8, per_node=8) == 450e9
    assert links.ring(processes=16, per_node=8) == links.ring(processes=8, per_node=4) == 50e9
    assert Links(node=300e9, network=400e9).ring(processes=512, per_node=8) == 300e9


def test_a_cpu_has_no_peak():
    assert peak_flops(torch.device("cpu"), bf16=False) is None


@pytest.mark.gpu
def test_the_gpu_at_hand_is_found_by_its_name():
    device = torch.device("cuda", 0)
    assert peak_flops(device, bf16=True) == peak_of(torch.cuda.get_device_name(device), bf16=True)
