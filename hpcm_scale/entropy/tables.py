"""The tables that entropy coding works with: a symbol is coded with the table of a scale near its own.

The frequencies of a table are integers that come out alike on every machine and in every version of every
mathematics library: `decimal` rounds exp and ln correctly, and all else is rational arithmetic.
"""

from __future__ import annotations

import math
from decimal import ROUND_FLOOR, Context, Decimal, localcontext
from functools import lru_cache

import torch
from torch import Tensor

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
