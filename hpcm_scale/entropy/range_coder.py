"""Integers to bytes and back: range coding with one table per symbol, grouped by table.

What is written is read by calls of the same kinds in the same order, with the same tables. Symbols beyond a
table are escaped: the table's last entry, and after the group the number itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_FLOOR, Context, Decimal, localcontext
from functools import lru_cache

import numpy as np
import torch
from constriction import stream
from torch import Tensor

# The tables that entropy coding works with: a symbol is coded with the table of a scale near its own.
#
# The frequencies of a table are integers that come out alike on every machine and in every version of every
# mathematics library: `decimal` rounds exp and ln correctly, and all else is rational arithmetic.


TABLE_SIZE = 60
LOWEST, HIGHEST = 0.12, 64.0
SPACING = math.log(HIGHEST / LOWEST) / (TABLE_SIZE - 1)
"""Between two boundaries, in ln(scale)."""
PRECISION = 24
"""Frequencies of a table sum to 2^24, the range coder's own precision."""

_LIKELIHOOD_BOUND = Decimal("1e-9")
_DIGITS = Context(prec=40)
_GAMMA = Decimal("1.354117939426400416945288028154513785519")  # Γ(2/3)


def scale_table(device: torch.device | str | None = None) -> Tensor:
    """The scales that bound the tables, log-spaced from 0.12 to 64: (60,) fp32, ascending."""
    scales = [LOWEST * math.exp(SPACING * index) for index in range(TABLE_SIZE)]
    return torch.tensor(scales, dtype=torch.float32, device=device)


def table_index(scale: Tensor) -> Tensor:
    """Table of each scale: how many entries of `scale_table`, the last left out, lie below it.

    Any shape; compared in fp32. Returns int64 of the same shape, 0 to 59.
    """
    return torch.bucketize(scale.float().contiguous(), scale_table(scale.device)[:-1])


@lru_cache(maxsize=TABLE_SIZE)
def frequencies(table: int) -> tuple[int, ...]:
    """How often in 2^24 each symbol comes up in a table: of −L … L, and last of all symbols beyond them.

    Table 0 serves scales up to 0.12, the last one scales from 57.5; the others take the geometric mean of
    their bounds, which costs 0.03 to 0.06 % over tables without number. Beyond L a symbol's likelihood is
    less than 1e-9, the bound of the estimated rate; every frequency is at least 1.
    """
    with localcontext(_DIGITS):
        scale = _scale(table)
        total = 2**PRECISION
        within = [_mass(Decimal(1) / (2 * scale))]  # of |v| < ½, 1½, …
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
    """Probability of less than t on either side of the mode: P(2/3, t^1.5), by its series."""
    x = t * t.sqrt()
    order = Decimal(2) / 3
    term = summed = 1 / order
    while term > summed * Decimal("1e-30"):
        order += 1
        term *= x / order
        summed += term
    return t * (-x).exp() * summed / _GAMMA


LARGEST_SYMBOL = 2**22
"""Magnitudes beyond it are not coded; fp32 latents hold whole numbers up to 2^24."""

_LENGTHS = 32  # an escaped number is written as its bit length, then the bits below the first


class CorruptStream(ValueError):
    """Bytes that no encoder with these tables has written."""


class SymbolWriter:
    """Writes integers; `bytes` is what they became."""

    def __init__(self) -> None:
        self._coder = stream.queue.RangeEncoder()

    def write(self, symbols: np.ndarray, tables: np.ndarray) -> None:
        """Append `symbols` (n,) int32, each with its table, (n,) integers 0 to 59.

        Magnitudes are at most LARGEST_SYMBOL.
        """
        order, counts = _groups(tables)
        grouped = symbols[order].astype(np.int32)
        widest = _half_widths()[tables[order]]
        escaped = np.abs(grouped) > widest
        entries = np.where(escaped, 2 * widest + 1, grouped + widest)
        start = 0
        for table, count in counts:
            self._coder.encode(entries[start : start + count], _table(table))
            start += count
        if escaped.any():
            self._write_numbers(_to_unsigned(grouped[escaped], widest[escaped]))

    def write_choices(self, choices: np.ndarray, probabilities: Sequence[float]) -> None:
        """Append integers (n,) from 0, all with the same table of probabilities."""
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
        """Everything written so far, little-endian; empty if that is nothing."""
        return self._coder.get_compressed().astype("<u4").tobytes()


class SymbolReader:
    """Reads what `SymbolWriter` wrote. Every read raises `CorruptStream` where the bytes cannot be right."""

    def __init__(self, data: bytes) -> None:
        if len(data) % 4:
            raise CorruptStream("a stream is a whole number of 32-bit words")
        self._coder = stream.queue.RangeDecoder(np.frombuffer(data, "<u4").astype(np.uint32))
        self._bits_left = 8.0 * len(data)

    def read(self, tables: np.ndarray) -> np.ndarray:
        """The symbols (n,) int32 that were written with these tables (n,)."""
        order, counts = _groups(tables)
        self._bits_left -= least_bits(tables)
        if self._bits_left < 0:  # the coder itself would read on for ever
            raise CorruptStream("the stream is too short for so many symbols")
        entries = np.concatenate([self._decode(_table(table), count) for table, count in counts])
        widest = _half_widths()[tables[order]]
        grouped = entries - widest
        escaped = entries > 2 * widest
        if escaped.any():
            grouped[escaped] = _to_signed(self._read_numbers(int(escaped.sum())), widest[escaped])
        symbols = np.empty_like(grouped)
        symbols[order] = grouped
        return symbols

    def read_choices(self, count: int, probabilities: Sequence[float]) -> np.ndarray:
        """The integers (count,) that were written with these probabilities."""
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

    def _decode(self, model, count_or_parameters) -> np.ndarray:
        try:
            return self._coder.decode(model, count_or_parameters)
        except (AssertionError, ValueError) as error:  # what constriction raises on impossible bytes
            raise CorruptStream(str(error)) from error


def least_bits(tables: np.ndarray) -> float:
    """What any stream of symbols with these tables (n,) has at least: as if the likeliest came every time."""
    return float(np.bincount(tables, minlength=TABLE_SIZE) @ _least_bits())


def _groups(tables: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Positions sorted by table, and (table, how many) for every table that occurs."""
    tables = tables.astype(np.uint8)  # sorts in linear time
    counts = np.bincount(tables, minlength=TABLE_SIZE)
    return np.argsort(tables, kind="stable"), [(t, int(counts[t])) for t in np.flatnonzero(counts)]


def _to_unsigned(symbols: np.ndarray, widest: np.ndarray) -> np.ndarray:
    """Symbols beyond ±widest as numbers from 1, the sign in the lowest bit."""
    return 2 * (np.abs(symbols) - widest) - (symbols > 0)


def _to_signed(numbers: np.ndarray, widest: np.ndarray) -> np.ndarray:
    magnitudes = (numbers + 1) // 2 + widest
    return np.where(numbers % 2 == 1, magnitudes, -magnitudes)


def _bit_lengths(numbers: np.ndarray) -> np.ndarray:
    """Of positive integers below 2^53."""
    return np.frexp(numbers.astype(np.float64))[1]


@lru_cache(maxsize=TABLE_SIZE)
def _table(index: int):
    return _categorical(tuple(count / 2**PRECISION for count in frequencies(index)))


@lru_cache(maxsize=1)
def _least_bits() -> np.ndarray:
    """Of one symbol with every table: (60,). constriction may round a frequency up by two."""
    return PRECISION - np.log2([max(frequencies(table)) + 2 for table in range(TABLE_SIZE)])


@lru_cache(maxsize=2 * TABLE_SIZE)
def _categorical(probabilities: tuple[float, ...]):
    return stream.model.Categorical(np.array(probabilities, dtype=np.float64), perfect=False)


@lru_cache(maxsize=1)
def _half_widths() -> np.ndarray:
    """L of every table: (60,) int32."""
    return np.array([len(frequencies(table)) // 2 - 1 for table in range(TABLE_SIZE)], dtype=np.int32)
