"""`hpcm bench entropy`: symbols per second of the range coder, and time of the training likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.machine import machine
from bench.report import Report, Table, with_quartiles
from bench.timing import alternate, ratio, seconds
from hpcm_scale.entropy.generalized_gaussian import bits
from hpcm_scale.entropy.range_coder import (
    HIGHEST,
    LOWEST,
    PRECISION,
    SymbolReader,
    SymbolWriter,
    frequencies,
    table_index,
)
from hpcm_scale.model.coding_order import CodingOrder

SINGLE = 5_000
"""Symbols that are coded one by one, because all of them would take minutes."""
PUBLIC, SURVIVAL = "public formula", "survival formula"


@dataclass(frozen=True)
class Grouping:
    """One way to group symbols for the range coder."""

    name: str
    symbols: int
    bits: float
    """Length of the stream."""
    least_bits: float
    """Entropy of these symbols by the frequencies of their tables."""
    encode: list[float]
    """Seconds of each round."""
    decode: list[float]


@dataclass(frozen=True)
class Likelihood:
    """Forward and backward pass of the rate of a latent, by both formulas."""

    elements: int
    compiled: bool
    public: list[float]
    """Seconds of each round."""
    survival: list[float]


def draw_symbols(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Symbols (count,) int32 and their tables (count,) int64: log-uniform scales, symbols drawn from their tables."""
    generator = np.random.default_rng(0)
    scales = LOWEST * (HIGHEST / LOWEST) ** generator.random(count)
    tables = table_index(torch.from_numpy(scales)).numpy()
    symbols = np.empty(count, dtype=np.int32)
    for table in np.unique(tables):
        within = np.array(frequencies(int(table))[:-1], dtype=np.float64)  # the last one is the escape symbol
        positions = np.flatnonzero(tables == table)
        drawn = generator.choice(len(within), len(positions), p=within / within.sum())
        symbols[positions] = drawn - len(within) // 2
    return symbols, tables


def measure_range_coder(count: int, rounds: int) -> list[Grouping]:
    """Encode and decode `count` symbols all at once, in as many steps as files have, and one by one."""
    symbols, tables = draw_symbols(count)
    single = min(count, SINGLE)
    steps = sum(len(scale.steps) for scale in CodingOrder().scales)
    groupings = {
        "one by one": (single, single),
        f"by table, in {steps} steps as in files": (count, steps),
        "by table, all at once": (count, 1),
    }
    candidates: dict[str, Callable[[], Any]] = {}
    streams = {}
    for name, (size, pieces) in groupings.items():
        parts = [np.array_split(values[:size], pieces) for values in (symbols, tables)]
        streams[name] = _write(*parts)
        read = _read(streams[name], parts[1])
        assert np.array_equal(read, symbols[:size]), name
        candidates[f"encode {name}"] = lambda parts=parts: _write(*parts)
        candidates[f"decode {name}"] = lambda data=streams[name], parts=parts: _read(data, parts[1])
    samples = alternate(candidates, rounds, torch.device("cpu"), description="range coder")
    return [
        Grouping(
            name=name,
            symbols=size,
            bits=8.0 * len(streams[name]),
            least_bits=_entropy(symbols[:size], tables[:size]),
            encode=seconds(samples[f"encode {name}"]),
            decode=seconds(samples[f"decode {name}"]),
        )
        for name, (size, _) in groupings.items()
    ]


def _write(symbols: Sequence[np.ndarray], tables: Sequence[np.ndarray]) -> bytes:
    writer = SymbolWriter()
    for piece, table in zip(symbols, tables, strict=True):
        writer.write(piece, table)
    return writer.bytes


def _read(data: bytes, tables: Sequence[np.ndarray]) -> np.ndarray:
    reader = SymbolReader(data)
    return np.concatenate([reader.read(piece) for piece in tables])


def _entropy(symbols: np.ndarray, tables: np.ndarray) -> float:
    """Bits of the symbols if each takes −log2 of its frequency in its table."""
    total = 0.0
    for table in np.unique(tables):
        counts = np.array(frequencies(int(table)), dtype=np.float64)
        chosen = symbols[tables == table] + len(counts) // 2 - 1
        total += float((PRECISION - np.log2(counts[chosen])).sum())
    return total


def measure_likelihood(elements: int, rounds: int, device: torch.device, *, compiled: bool) -> Likelihood:
    """Forward and backward of the bits of `elements` elements: the public formula and ours, which may be compiled."""
    generator = torch.Generator().manual_seed(0)
    scale = LOWEST * (HIGHEST / LOWEST) ** torch.rand(elements, generator=generator)
    residual = scale * torch.randn(elements, generator=generator)
    scale, residual = (x.to(device).requires_grad_() for x in (scale, residual))
    ours = torch.compile(bits) if compiled else bits

    def pass_through(formula: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            residual.grad = scale.grad = None
            formula(residual, scale).sum().backward()

        return run

    candidates = {PUBLIC: pass_through(lambda *both: bits(*both, formula="public")), SURVIVAL: pass_through(ours)}
    samples = alternate(candidates, rounds, device, warm_up=3, description="likelihood")
    return Likelihood(elements, compiled, seconds(samples[PUBLIC]), seconds(samples[SURVIVAL]))


def entropy_report(groupings: list[Grouping], likelihood: Likelihood, device: torch.device) -> Report:
    """Tables and numbers of `hpcm bench entropy`."""
    tables = [_range_coder_table(groupings), _likelihood_table(likelihood)]
    results = {"range_coder": [vars(grouping) for grouping in groupings], "likelihood": vars(likelihood)}
    return Report("entropy", "Entropy coding and its likelihoods", machine(device), tables, results)


def _range_coder_table(groupings: list[Grouping]) -> Table:
    baseline = groupings[0]

    def faster(grouping: Grouping, direction: str) -> str:
        old, new = ([each / kind.symbols for each in getattr(kind, direction)] for kind in (baseline, grouping))
        return with_quartiles(ratio(old, new), 1, "×")

    rows = [
        [
            grouping.name,
            f"{grouping.symbols:,}",
            *(f"{grouping.symbols / median(times) / 1e6:,.2f}" for times in (grouping.encode, grouping.decode)),
            faster(grouping, "encode"),
            faster(grouping, "decode"),
            f"{100 * (grouping.bits / grouping.least_bits - 1):.3f} %",
        ]
        for grouping in groupings
    ]
    headings = [
        "symbols",
        "encoded (million/s)",
        "decoded (million/s)",
        "times as fast: encode",
        "decode",
        "over entropy",
    ]
    note = (
        f"One thread, {len(baseline.encode)} alternating rounds; medians, in brackets the quartiles of the rounds' "
        "ratios of the times per symbol to those of the first line. Over entropy: bits beyond the entropy of the "
        "tables. Decoding gave the encoded symbols."
    )
    return Table("Range coder", ["grouping", *headings], rows, [note])


def _likelihood_table(likelihood: Likelihood) -> Table:
    ours = f"{SURVIVAL}{', compiled' if likelihood.compiled else ''}"
    rows = [
        [name, f"{1e3 * median(times):,.2f}", with_quartiles(ratio(likelihood.public, times), 2, "×")]
        for name, times in ((PUBLIC, likelihood.public), (ours, likelihood.survival))
    ]
    note = (
        f"Bits of {likelihood.elements:,} elements and their gradients, {len(likelihood.public)} alternating rounds; "
        "medians, in brackets the quartiles of the rounds' ratios to the first line."
    )
    return Table("Likelihood, forward and backward", ["", "ms", "times as fast"], rows, [note])
