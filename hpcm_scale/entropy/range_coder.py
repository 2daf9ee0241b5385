"""Range coding of integers, with one of 60 frequency tables per symbol.

The reader repeats the calls of the writer in the same order, with the same tables. Symbols are grouped by table. One
beyond its table is escaped: the last entry of the table, and after the group the number itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_FLOOR, Context, Decimal, localcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from constriction import stream  # pyright: ignore[reportAttributeAccessIssue, reportMissingTypeStubs] (compiled)
from torch import Tensor

# Tables. Their frequencies are integers that are equal on all machines and with all versions of mathematics libraries:
# `decimal` rounds exp and ln correctly, and everything else is rational arithmetic.

TABLE_SIZE = 60
LOWEST, HIGHEST = 0.12, 64.0
SPACING = math.log(HIGHEST / LOWEST) / (TABLE_SIZE - 1)
"""Between the bounds of a table, in ln(scale)."""
PRECISION = 24
"""Frequencies of a table sum to 2^24, the precision of the range coder."""

_LIKELIHOOD_BOUND = Decimal("1e-9")
_DIGITS = Context(prec=40)
_GAMMA = Decimal("1.354117939426400416945288028154513785519")  # Γ(2/3)


def scale_table(device: torch.device | str | None = None) -> Tensor:
    """The bounds of the tables, log-spaced scales from 0.12 to 64: (60,) fp32, ascending."""
    scales = [LOWEST * math.exp(SPACING * index) for index in range(TABLE_SIZE)]
    return torch.tensor(scales, dtype=torch.float32, device=device)


def table_index(scale: Tensor) -> Tensor:
    """The table of each scale: the number of entries of `scale_table`, except the last, below it.

    Any shape; compared in fp32. Returns int64 of the same shape, 0 to 59.
    """
    return torch.bucketize(scale.float().contiguous(), scale_table(scale.device)[:-1])


@lru_cache(maxsize=TABLE_SIZE)
def frequencies(table: int) -> tuple[int, ...]:
    """Frequencies in 2^24 of the symbols −L … L of a table and, last, of all symbols beyond them; each at least 1.

    Table 0 is for scales up to 0.12, the last one for scales from 57.5; the others use the geometric mean of their
    bounds, which costs 0.03 to 0.06 % of the rate. Beyond L the likelihood of a symbol is less than 1e-9, the bound of
    the estimated rate.
    """
    with localcontext(_DIGITS):
        scale = _scale(table)
        total = 2**PRECISION
        within = [_mass(Decimal(1) / (2 * scale))]  # |v| < ½, 1½, …
        magnitudes: list[int] = []
        while True:
            within.append(_mass((2 * len(within) + 1) / (2 * scale)))
            likelihood = (within[-1] - within[-2]) / 2
            if likelihood < _LIKELIHOOD_BOUND:
                break
            magnitudes.append(max(1, int((likelihood * total).to_integral_value(ROUND_FLOOR))))
        beyond = max(1, int(((1 - within[-2]) * total).to_integral_value(ROUND_FLOOR)))
    zero = total - 2 * sum(magnitudes) - beyond
    return (*reversed(magnitudes), zero, *magnitudes, beyond)


def _scale(table: int) -> Decimal:
    """The scale that a table stands for."""
    lowest, highest = Decimal("0.12"), Decimal(64)
    if table in (0, TABLE_SIZE - 1):
        return lowest if table == 0 else highest
    return lowest * ((highest / lowest).ln() * (2 * table - 1) / (2 * (TABLE_SIZE - 1))).exp()


def _mass(t: Decimal) -> Decimal:
    """Probability of |v| < t: P(2/3, t^1.5), by its series."""
    x = t * t.sqrt()
    order = Decimal(2) / 3
    term = summed = 1 / order
    while term > summed * Decimal("1e-30"):
        order += 1
        term *= x / order
        summed += term
    return t * (-x).exp() * summed / _GAMMA


LARGEST_SYMBOL = 2**22
"""Largest magnitude; fp32 latents represent integers up to 2^24."""

_LENGTHS = 32  # an escaped number is written as its bit length, then the bits below the first


class CorruptStream(ValueError):
    """Bytes that `SymbolWriter` cannot have written with these tables."""


class SymbolWriter:
    """Encodes integers to `bytes`."""

    def __init__(self) -> None:
        self._coder = stream.queue.RangeEncoder()

    def write(self, symbols: np.ndarray, tables: np.ndarray) -> None:
        """Append `symbols` (n,) int32, of magnitudes up to LARGEST_SYMBOL, with their tables (n,), 0 to 59."""
        order, counts = _groups(tables)
        grouped = symbols[order].astype(np.int32)
        limits = _half_widths()[tables[order]]
        escaped = np.abs(grouped) > limits
        entries = np.where(escaped, 2 * limits + 1, grouped + limits)
        start = 0
        for table, count in counts:
            self._coder.encode(entries[start : start + count], _table(table))
            start += count
        if escaped.any():
            self._write_numbers(_to_unsigned(grouped[escaped], limits[escaped]))

    def write_choices(self, choices: np.ndarray, probabilities: Sequence[float]) -> None:
        """Append integers (n,) from 0, all with the same probabilities."""
        self._coder.encode(choices.astype(np.int32), _categorical(tuple(probabilities)))

    def _write_numbers(self, numbers: np.ndarray) -> None:
        """Elias gamma codes of numbers from 1."""
        lengths = _bit_lengths(numbers)
        self._coder.encode(lengths.astype(np.int32), stream.model.Uniform(_LENGTHS))
        long = lengths > 1
        if long.any():
            sizes = (1 << (lengths[long] - 1)).astype(np.int32)
            self._coder.encode((numbers[long] - sizes).astype(np.int32), stream.model.Uniform(), sizes)

    @property
    def bytes(self) -> bytes:
        """The stream so far, little-endian; empty before the first write."""
        return self._coder.get_compressed().astype("<u4").tobytes()


class SymbolReader:
    """Decodes what `SymbolWriter` wrote. Each method raises `CorruptStream` for bytes that it cannot have written."""

    def __init__(self, data: bytes) -> None:
        if len(data) % 4:
            raise CorruptStream("the length of the stream is not a multiple of 4 bytes")
        self._coder = stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
        self._bits_left = 8.0 * len(data)

    def read(self, tables: np.ndarray) -> np.ndarray:
        """Read the symbols (n,) int32 that were written with these tables (n,)."""
        order, counts = _groups(tables)
        self._bits_left -= least_bits(tables)
        if self._bits_left < 0:  # constriction reads on beyond the end
            raise CorruptStream("the stream is too short for so many symbols")
        entries = np.concatenate([self._decode(_table(table), count) for table, count in counts])
        limits = _half_widths()[tables[order]]
        grouped = entries - limits
        escaped = entries > 2 * limits
        if escaped.any():
            grouped[escaped] = _to_signed(self._read_numbers(int(escaped.sum())), limits[escaped])
        symbols = np.empty_like(grouped)
        symbols[order] = grouped
        return symbols

    def read_choices(self, count: int, probabilities: Sequence[float]) -> np.ndarray:
        """Read the integers (count,) that were written with these probabilities."""
        return self._decode(_categorical(tuple(probabilities)), count)

    def _read_numbers(self, count: int) -> np.ndarray:
        lengths = self._decode(stream.model.Uniform(_LENGTHS), count)
        if lengths.min() < 1 or lengths.max() > PRECISION:
            raise CorruptStream("an escaped symbol is out of range")
        numbers = np.ones(count, dtype=np.int32)
        long = lengths > 1
        if long.any():
            sizes = (1 << (lengths[long] - 1)).astype(np.int32)
            numbers[long] = sizes + self._decode(stream.model.Uniform(), sizes)
        return numbers

    def _decode(self, model: Any, count_or_parameters: Any) -> np.ndarray:
        try:
            return self._coder.decode(model, count_or_parameters)
        except (AssertionError, ValueError) as error:  # of constriction, for impossible bytes
            raise CorruptStream(str(error)) from error


def least_bits(tables: np.ndarray) -> float:
    """Least bits of a stream of symbols with these tables (n,): each symbol the most probable one."""
    return float(np.bincount(tables, minlength=TABLE_SIZE) @ _least_bits())


def _groups(tables: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Positions sorted by table, and (table, count) for each table that occurs."""
    tables = tables.astype(np.uint8)  # sorts in linear time
    counts = np.bincount(tables, minlength=TABLE_SIZE)
    return np.argsort(tables, kind="stable"), [(t, int(counts[t])) for t in np.flatnonzero(counts).tolist()]


def _to_unsigned(symbols: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Symbols beyond ±limits as numbers from 1, with the sign in the lowest bit."""
    return 2 * (np.abs(symbols) - limits) - (symbols > 0)


def _to_signed(numbers: np.ndarray, limits: np.ndarray) -> np.ndarray:
    magnitudes = (numbers + 1) // 2 + limits
    return np.where(numbers % 2 == 1, magnitudes, -magnitudes)


def _bit_lengths(numbers: np.ndarray) -> np.ndarray:
    """Bit lengths of positive integers below 2^53."""
    return np.frexp(numbers.astype(np.float64))[1]


@lru_cache(maxsize=TABLE_SIZE)
def _table(index: int):
    return _categorical(tuple(count / 2**PRECISION for count in frequencies(index)))


@lru_cache(maxsize=1)
def _least_bits() -> np.ndarray:
    """Least bits of one symbol of each table, (60,); constriction may round a frequency up by two."""
    return PRECISION - np.log2([max(frequencies(table)) + 2 for table in range(TABLE_SIZE)])


@lru_cache(maxsize=2 * TABLE_SIZE)
def _categorical(probabilities: tuple[float, ...]):
    return stream.model.Categorical(np.array(probabilities, dtype=np.float64), perfect=False)


@lru_cache(maxsize=1)
def _half_widths() -> np.ndarray:
    """L of each table, (60,) int32."""
    return np.array([len(frequencies(table)) // 2 - 1 for table in range(TABLE_SIZE)], dtype=np.int32)
