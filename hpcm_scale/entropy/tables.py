"""The scales that entropy coding works with: a symbol is coded with the table of a scale near its own."""

from __future__ import annotations

import torch
from torch import Tensor

TABLE_SIZE = 60
LOWEST, HIGHEST = 0.12, 64.0


def scale_table(device: torch.device | str | None = None) -> Tensor:
    """The scales of the tables, log-spaced from 0.12 to 64: (60,) fp32, ascending.

    Worked out in float64 and rounded once, so that encoder and decoder have the same numbers.
    """
    ratio = HIGHEST / LOWEST
    scales = [LOWEST * ratio ** (index / (TABLE_SIZE - 1)) for index in range(TABLE_SIZE)]
    return torch.tensor(scales, dtype=torch.float32, device=device)


def table_index(scale: Tensor) -> Tensor:
    """Table of each scale: how many entries of `scale_table`, the last left out, lie below it.

    Any shape; compared in fp32. Returns int64 of the same shape, 0 to 59. The table's scale is never
    less than the symbol's, up to the last table, which serves every larger scale too.
    """
    return torch.bucketize(scale.float().contiguous(), scale_table(scale.device)[:-1])
