"""Which variant of 1×1 convolutions and window attention is the fastest? layers.py chooses by these results.

    python benchmarks/kernels.py [--rounds 9] [--out FOLDER]

Forward and backward, at the sizes of 68m with two crops of 256²; alternating rounds, medians of their ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from bench.machine import machine
from bench.report import Report, Table, publish, with_quartiles
from bench.timing import alternate, ratio, seconds
from torch import Tensor

from hpcm_scale.model.arithmetic import product

CONVOLUTIONS = ((96, 384, 128), (384, 96, 128), (192, 768, 64), (384, 1536, 32), (960, 1920, 16), (960, 1920, 4))
"""Inputs, outputs, side."""
WINDOWS = ((8, 32, 64, 20), (2, 32, 16, 20))
"""Windows, heads, positions, channels of a head, at s3 and s1."""
DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    tables = [
        Table("1×1 convolutions", [*_HEADINGS, "channels-last", "matrix product"], [], []),
        Table("attention", [*_HEADINGS, "two products and softmax"], [], []),
    ]
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for inputs, outputs, side in CONVOLUTIONS:
            variants = convolutions(inputs, outputs, side, dtype, device)
            what = f"{name}, {inputs} → {outputs}, {side}²"
            tables[0].rows.append(row(what, variants, 6 * 2 * side**2 * inputs * outputs, arguments.rounds, device))
        for shape in WINDOWS:
            windows, heads, positions, width = shape
            flops = 12 * windows * heads * positions**2 * width
            what = f"{name}, {windows} × {heads} heads, {positions} positions of {width}"
            tables[1].rows.append(row(what, attention(shape, dtype, device), flops, arguments.rounds, device))
    report = Report(
        name="kernels",
        title="Variants to compute a layer of 68m, forward and backward, two crops of 256²",
        machine=machine(device, ("python", "benchmarks/kernels.py")),
        tables=tables,
        results={table.title: table.rows for table in tables},
    )
    publish(report, arguments.out)


_HEADINGS = ["layer", "first variant (GFLOP/s)"]


def row(what: str, variants: dict[str, Callable[[], None]], flops: int, rounds: int, device: torch.device) -> list[str]:
    """A row of the table: the rate of the first variant, and the speed of the others relative to it."""
    first, *others = [seconds(samples) for samples in alternate(variants, rounds, device).values()]
    rate = flops / median(first) / 1e9
    return [what, f"{rate:,.0f}", *(with_quartiles(ratio(first, other), 2, "×") for other in others)]


def convolutions(
    inputs: int, outputs: int, side: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], None]]:
    """1×1 convolutions; the contiguous memory format first."""
    x = torch.randn(2, inputs, side, side, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, 1, 1, device=device, dtype=dtype, requires_grad=True)
    bias = torch.randn(outputs, device=device, dtype=dtype, requires_grad=True)

    def as_product(x: Tensor) -> Tensor:
        return product(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)

    def convolution(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias)

    last = torch.channels_last
    kinds = [(convolution, torch.contiguous_format), (convolution, last), (as_product, last)]
    variants = {}
    for index, (layer, memory_format) in enumerate(kinds):
        of_kind = x.to(memory_format=memory_format, copy=True).requires_grad_()
        gradient = torch.randn(2, outputs, side, side, device=device).to(dtype).to(memory_format=memory_format)
        variants[str(index)] = partial(forward_backward, partial(layer, of_kind), gradient)
    return variants


def attention(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], None]]:
    """Window attention; torch's own kernel first."""
    inputs = [torch.randn(*shape, device=device).to(dtype).requires_grad_() for _ in range(3)]
    gradient = torch.randn(*shape, device=device).to(dtype)

    def products() -> Tensor:
        query, key, value = inputs
        return ((query * shape[-1] ** -0.5) @ key.transpose(-1, -2)).softmax(dim=-1) @ value

    torchs = partial(F.scaled_dot_product_attention, *inputs)
    return {
        "torch": partial(forward_backward, torchs, gradient),
        "products": partial(forward_backward, products, gradient),
    }


def forward_backward(forward: Callable[[], Tensor], gradient: Tensor) -> None:
    """Forward and backward; gradients accumulate, as over the steps of the coding order."""
    forward().backward(gradient)


if __name__ == "__main__":
    main()
