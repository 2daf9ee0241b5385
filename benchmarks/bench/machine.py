"""The machine of a benchmark: hardware, versions, and its rate of matrix products."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from bench.timing import Sample, seconds, timed
from hpcm_scale.config.schema import Precision
from hpcm_scale.model.layers import set_arithmetic
from hpcm_scale.tracking.environment import environment

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
_SIDES = {"cpu": 2048, "cuda": 8192}
_LONG_ENOUGH = 0.1
"""Shortest time of one measurement of a matrix product, seconds."""


def machine(device: torch.device, program: Sequence[str] = ("hpcm", "bench")) -> dict[str, Any]:
    """Date, command, versions and hardware, as plain JSON values (see `tracking.environment`).

    `program`: the command before its arguments.
    """
    facts = environment()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **facts,
        "command": shlex.join([*program, *sys.argv[1:]]),
        "cpu_flags": cpu_flags(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def cpu_flags() -> list[str]:
    """Instruction sets of the CPU that affect matrix products; empty if they cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return [flag for flag in _FLAGS if flag in flags]


@contextmanager
def arithmetic(precision: Precision) -> Iterator[None]:
    """Inside, fp32 products are computed as in training with this precision; exactly again afterwards."""
    set_arithmetic(precision)
    try:
        yield
    finally:
        set_arithmetic(Precision.fp32)


class Product(NamedTuple):
    """A large matrix product of one precision, computed by one library."""

    precision: Precision
    name: str
    flops: int
    """FLOPs of one run: 2 per multiply-accumulate."""
    run: Callable[[], Any]


def products(precision: Precision, device: torch.device) -> list[Product]:
    """The same large product as `torch.mm` and as a channels-last 1×1 convolution.

    On some CPUs the libraries behind the two differ twofold; the faster one is the rate of the device.
    """
    side, dtype = _SIDES[device.type], DTYPES[precision]
    left, right = (torch.rand(side, side, device=device).sub_(0.5).to(dtype) for _ in range(2))
    rows = side // 32
    pixels = left.view(1, rows, 32, side).permute(0, 3, 1, 2)  # channels-last: a view of the same memory
    convolution = nn.Conv2d(side, side, 1, bias=False, device=device, dtype=dtype).requires_grad_(False)
    convolution.to(memory_format=torch.channels_last)
    kinds = {"torch.mm": lambda: left @ right, "1×1 convolution": lambda: convolution(pixels)}
    return [_long_enough(precision, name, 2 * side**3, run, device) for name, run in kinds.items()]


def _long_enough(precision: Precision, name: str, flops: int, run: Callable[[], Any], device: torch.device) -> Product:
    """The product, repeated until it takes `_LONG_ENOUGH`."""
    with arithmetic(precision):
        timed(run, device)
        times = max(1, round(_LONG_ENOUGH / timed(run, device).seconds))

    def run_often() -> None:
        with arithmetic(precision):
            for _ in range(times):
                run()

    return Product(precision, name, times * flops, run_often)


class MatmulRate(NamedTuple):
    """The device's rate of large matrix products in one precision."""

    name: str
    """Name of the faster library call."""
    rates: list[float]
    """FLOP/s in each round."""


def matmul_rate(measured: Sequence[tuple[Product, Sequence[Sample]]]) -> MatmulRate:
    """The faster of several products of one precision, by the median over the rounds."""
    rates = [MatmulRate(run.name, [run.flops / each for each in seconds(samples)]) for run, samples in measured]
    return max(rates, key=lambda rate: median(rate.rates))
