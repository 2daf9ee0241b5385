"""From packed values in coding order back to a grid."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcm_scale.model.coding_order import CodingOrder


def join(order: CodingOrder, packed: list[Tensor]) -> Tensor:
    """The inverse of `CodingOrder.split`: (B, M, H, W)."""
    values, grid = iter(packed), None
    for scale in order.scales:
        for step in scale.steps:
            of_step = next(values)
            if step is scale.steps[0]:
                groups, batch, channels, height, width = of_step.shape
                channels *= groups // len(step.offsets[0])
                empty = torch.zeros(batch, channels, height * step.cell, width * step.cell, dtype=of_step.dtype)
                grid = empty if grid is None else scale.refine(grid, empty)
            grid = step.put(of_step, grid)
    return grid
