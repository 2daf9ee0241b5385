"""What was measured on: hardware, versions, and how fast it multiplies matrices."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hpcm_scale.config.schema import Precision
from hpcm_scale.model.layers import set_arithmetic
from hpcm_scale.tracking.environment import environment
from hpcm_scale.tracking.timing import Turn, seconds, timed

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
_SIDES = {"cpu": 2048, "cuda": 8192}
_LONG_ENOUGH = 0.1
"""Seconds of work in one timing of a matrix product."""


def machine(device: torch.device, program: Sequence[str] = ("hpcm", "bench")) -> dict[str, Any]:
    """Date, command, versions and hardware, as plain JSON values (see `tracking.environment`).

    `program`: how what is running is called, before its arguments.
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
    """Those instruction sets of the CPU that decide how fast it multiplies; none where they cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return [flag for flag in _FLAGS if flag in flags]


@contextmanager
def arithmetic(precision: Precision) -> Iterator[None]:
    """Products of fp32 numbers as a training in this precision computes them; exact ones again afterwards."""
    set_arithmetic(precision)
    try:
        yield
    finally:
        set_arithmetic(Precision.fp32)


class Product(NamedTuple):
    """A large matrix product of one precision, as one library computes it."""

    precision: Precision
    name: str
    flops: int
    """Of one run: 2 per multiply-accumulate."""
    run: Callable[[], Any]


def products(precision: Precision, device: torch.device) -> list[Product]:
    """The same large product twice: as `torch.mm` and as a channels-last 1×1 convolution.

    On some CPUs the libraries behind the two differ twofold; the faster one tells what the device can do.
    """
    side, dtype = _SIDES[device.type], DTYPES[precision]
    left, right = (torch.rand(side, side, device=device).sub_(0.5).to(dtype) for _ in range(2))
    rows = side // 32
    pixels = left.view(1, rows, 32, side).permute(0, 3, 1, 2)  # channels-last: the same numbers, unmoved
    convolution = nn.Conv2d(side, side, 1, bias=False, device=device, dtype=dtype).requires_grad_(False)
    convolution.to(memory_format=torch.channels_last)
    kinds = {"torch.mm": lambda: left @ right, "1×1 convolution": lambda: convolution(pixels)}
    return [_long_enough(precision, name, 2 * side**3, run, device) for name, run in kinds.items()]


def _long_enough(precision: Precision, name: str, flops: int, run: Callable[[], Any], device: torch.device) -> Product:
    """As many runs in a row as can be timed well."""
    with arithmetic(precision):
        timed(run, device)
        times = max(1, round(_LONG_ENOUGH / timed(run, device).seconds))

    def run_often() -> None:
        with arithmetic(precision):
            for _ in range(times):
                run()

    return Product(precision, name, times * flops, run_often)


class MatmulRate(NamedTuple):
    """How fast the device multiplies large matrices in one precision."""

    name: str
    """Of the faster way to do it."""
    rates: list[float]
    """FLOP/s in each round."""


def matmul_rate(measured: Sequence[tuple[Product, Sequence[Turn]]]) -> MatmulRate:
    """The faster of several ways to compute products of one precision, in the median over the rounds."""
    ways = [MatmulRate(way.name, [way.flops / each for each in seconds(turns)]) for way, turns in measured]
    return max(ways, key=lambda way: sorted(way.rates)[len(way.rates) // 2])
