"""Rates of known accelerators, from their makers' data sheets: arithmetic (dense, without sparsity) and links."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # commands read the rates before they need torch, which takes seconds to import
    import torch

MFU = 0.4
"""Assumed share of a device's peak rate that training uses."""
LAUNCH_US = 7
"""Between the 5 and 10 µs that eager PyTorch takes for an operation on common hosts, autograd included."""

# What torch.cuda.get_device_name says, fp32 with TF32 off, bf16 with fp32 sums; the rates in FLOP/s.
# NVIDIA's data sheets give bf16 with sparsity, twice the rate here. B200, GB200: "Blackwell" data sheet, individual GPU
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
    """Of one accelerator to the others of its machine."""
    network: float
    """Of a whole machine to the others."""

    def ring(self, processes: int, per_node: int) -> float:
        """Bytes/s that every process sends where rings through all of them, `per_node` a machine, carry the data.

        What one process sends is what leaves its machine, on all network adapters together: every ring leaves it once.
        """
        return self.node if processes <= per_node else min(self.node, self.network)


# NVLink as a switch joins eight (half of what data sheets give for both directions); network adapters of the maker's
# own machines: DGX H100 and H200 eight of 400 Gb/s, DGX A100 eight of 200 Gb/s.
_LINKS: tuple[tuple[str, Links], ...] = (
    ("H200|H100( SXM5)?( 80GB HBM3)?", Links(450e9, 400e9)),
    ("A100(-SXM4(?!.*MIG).*)?", Links(300e9, 200e9)),
)


def peak_flops(device: torch.device, bf16: bool) -> float | None:
    """FLOP/s the device could do at this precision; None if it is not known: then there is no MFU."""
    if device.type != "cuda":
        return None
    import torch

    return peak_of(torch.cuda.get_device_name(device), bf16)


def peak_of(name: str, bf16: bool) -> float | None:
    """FLOP/s of an accelerator by its name, for example "NVIDIA H100 80GB HBM3"; None if unknown.

    The whole name counts: a laptop's, a "Ti" or a MIG slice of a known device is another, slower one.
    """
    for pattern, fp32_peak, bf16_peak in _PEAKS:
        if re.fullmatch(f"(NVIDIA )?{pattern}", name):
            return bf16_peak if bf16 else fp32_peak
    return None


def links_of(name: str) -> Links | None:
    """Bandwidths of an accelerator by its name, in the machines that its maker builds; None if not known."""
    for pattern, links in _LINKS:
        if re.fullmatch(f"(NVIDIA )?({pattern})", name):
            return links
    return None
