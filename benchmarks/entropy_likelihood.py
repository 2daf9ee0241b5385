"""Time of the rate of a latent, forward and backward: the survival formula against the public one.

    python benchmarks/entropy_likelihood.py [--elements N] [--rounds N] [--device cuda] [--compile]

Both formulas run in turn in one process on the same numbers; what counts is the ratio of each pair, printed
as the median and the quartiles over all pairs. With --compile the survival formula runs compiled.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch

from hpcm_scale.entropy.generalized_gaussian import bits


def seconds(formula, residual: torch.Tensor, scale: torch.Tensor) -> float:
    """One forward and backward pass, waited for."""
    residual.grad = scale.grad = None
    synchronize = torch.cuda.synchronize if residual.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    formula(residual, scale).sum().backward()
    synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--elements", type=int, default=2 * 320 * 16 * 16, help="default: 2 crops, 68m")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    scale = 0.12 * (64 / 0.12) ** torch.rand(options.elements, generator=generator)
    residual = scale * torch.randn(options.elements, generator=generator)
    scale, residual = (x.to(options.device).requires_grad_() for x in (scale, residual))

    def public(residual, scale):
        return bits(residual, scale, "public")

    survival = torch.compile(bits) if options.compile else bits
    for _ in range(3):
        seconds(public, residual, scale), seconds(survival, residual, scale)
    pairs = [(seconds(public, residual, scale), seconds(survival, residual, scale)) for _ in range(options.rounds)]

    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {device}", end=", ")
    print(f"{torch.get_num_threads()} CPU threads, {options.elements} elements, {options.rounds} pairs")
    for name, times in zip(("public", "survival"), zip(*pairs, strict=True), strict=True):
        print(f"{name:9s} median {1e3 * statistics.median(times):8.2f} ms")
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    print(f"public / survival: median {middle:.2f}, quartiles {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
