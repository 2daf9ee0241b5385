"""Peak rates of known accelerators, from data sheets: arithmetic (dense, without sparsity) and links."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from hpcm_scale.errors import UserError

if TYPE_CHECKING:  # torch is slow to import
    import torch

MFU = 0.4
"""Assumed model FLOPs utilisation of training."""
LAUNCH_US = 7
"""Assumed launch time of an operation, in µs; eager PyTorch with autograd takes 5 to 10 µs on common hosts."""

# Pattern of torch.cuda.get_device_name; FLOP/s of fp32 without TF32, and of bf16 with fp32 sums.
# NVIDIA's data sheets list bf16 with sparsity, twice the rate here. B200, GB200: "Blackwell" data sheet, individual GPU
# of HGX B200 and GB200 NVL72. GH200, H20, H800: data sheets of the superchip and of the SXM boards. MI300X: AMD's data
# sheet, matrices.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 75e12, 2250e12),
    ("GB200", 80e12, 2500e12),
    ("GH200( 480GB| 144G HBM3e)?", 67e12, 989e12),
    ("H20", 44e12, 148e12),
    ("H800", 67e12, 989e12),
    ("(AMD Instinct )?MI300X", 163.4e12, 1307.4e12),
    ("H200", 67e12, 989e12),
    ("H200 NVL", 60e12, 835e12),
    ("H100( SXM5)?( 80GB HBM3)?", 67e12, 989e12),
    ("H100 NVL", 60e12, 835e12),
    ("H100 PCIe", 51e12, 756e12),
    ("A100([ -](?!.*MIG).*)?", 19.5e12, 312e12),
    ("L40S", 91.6e12, 362e12),
    ("(GeForce )?RTX 4090", 82.6e12, 165.2e12),
    ("(GeForce )?RTX 3090", 35.6e12, 71.2e12),
)


class Links(NamedTuple):
    """Bandwidths in bytes/s, in one direction."""

    node: float
    """From one accelerator to the others of its node."""
    network: float
    """From a node to the others."""

    def ring(self, processes: int, per_node: int) -> float:
        """Bytes/s that each process sends in a ring of all processes, `per_node` per node.

        Each ring leaves a node once, so its bandwidth is that of all network adapters of the node.
        """
        return self.node if processes <= per_node else min(self.node, self.network)


# NVLink of eight GPUs with a switch (half of the data sheets' bidirectional rate); network adapters of DGX nodes:
# H100 and H200 eight of 400 Gb/s, A100 eight of 200 Gb/s.
_LINKS: tuple[tuple[str, Links], ...] = (
    ("H200|H100( SXM5)?( 80GB HBM3)?", Links(450e9, 400e9)),
    ("A100(-SXM4(?!.*MIG).*)?", Links(300e9, 200e9)),
)


def peak_flops(device: torch.device, bf16: bool) -> float | None:
    """Peak FLOP/s of a device in bf16 or fp32; None if unknown, then there is no MFU."""
    if device.type != "cuda":
        return None
    import torch

    return peak_of(torch.cuda.get_device_name(device), bf16)


def peak_of(name: str, bf16: bool) -> float | None:
    """Peak FLOP/s of an accelerator by name, for example "NVIDIA H100 80GB HBM3"; None if unknown.

    The full name must match, in any case: laptop and "Ti" variants and MIG slices have other rates.
    """
    for pattern, fp32_peak, bf16_peak in _PEAKS:
        if re.fullmatch(f"(NVIDIA )?{pattern}", name, re.IGNORECASE):
            return bf16_peak if bf16 else fp32_peak
    return None


def peak_of_option(name: str, bf16: bool) -> float:
    """Peak FLOP/s of the accelerator that `--gpu` names. Raises UserError if it is unknown."""
    peak = peak_of(name, bf16)
    if peak is None:
        raise UserError(
            "unknown-gpu",
            "--gpu",
            f"the peak rate of --gpu {name} is unknown; give another, such as A100, H100 or 'H100 PCIe'",
        )
    return peak


def links_of(name: str) -> Links | None:
    """Bandwidths of an accelerator by name, in a DGX node; None if unknown."""
    for pattern, links in _LINKS:
        if re.fullmatch(f"(NVIDIA )?({pattern})", name):
            return links
    return None
