"""Peak rates of known accelerators, from their makers' data sheets (dense, without sparsity)."""

from __future__ import annotations

import re

import torch

# What torch.cuda.get_device_name says, fp32 with TF32 off, bf16 with fp32 sums; the rates in FLOP/s.
_PEAKS: tuple[tuple[str, float, float], ...] = (
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


def peak_flops(device: torch.device, bf16: bool) -> float | None:
    """FLOP/s the device could do at this precision; None if it is not known: then there is no MFU."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), bf16)


def peak_of(name: str, bf16: bool) -> float | None:
    """FLOP/s of an accelerator by its name, for example "NVIDIA H100 80GB HBM3"; None if unknown.

    The whole name counts: a laptop's, a "Ti" or a MIG slice of a known device is another, slower one.
    """
    for pattern, fp32_peak, bf16_peak in _PEAKS:
        if re.fullmatch(f"(NVIDIA )?{pattern}", name):
            return bf16_peak if bf16 else fp32_peak
    return None
