"""The order in which the positions of y are coded (arXiv 2507.19125, section III).

y is coded in three scales, each a half-resolution version of the next: s1, s2 and s3 = y. Each scale is coded in steps;
at a step each of the eight channel groups has its own positions, the same in every cell of the grid. Nothing depends on
data: a set of positions is a constant mask, or a constant gather.

Grids are (B, 8·C, H, W) with H and W multiples of the cell, or `parts` such grids concatenated in the channels. They
keep their memory format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from hpcm_scale.model.arithmetic import memory_format_of, normalize_strides

GROUPS = 8
Offset = tuple[int, int]


class Positions(nn.Module):
    """A constant set of positions on a grid: offsets (row, column) in a cell for each channel group.

    "Packed" values are those at the positions: (8·offsets, B, C, H/cell, W/cell), groups outermost.
    """

    group: Tensor
    row: Tensor
    column: Tensor
    _mask: Tensor
    _mask_last: Tensor

    def __init__(self, cell: int, offsets: tuple[tuple[Offset, ...], ...]) -> None:
        super().__init__()
        assert len(offsets) == GROUPS and len({len(group) for group in offsets}) == 1
        self.cell, self.offsets = cell, offsets
        places = [(group, row, column) for group, inside in enumerate(offsets) for row, column in inside]
        mask = torch.zeros(GROUPS, 1, 1, cell, 1, cell, dtype=torch.bool)
        for group, row, column in places:
            mask[group, 0, 0, row, 0, column] = True
        self.register_buffer("_mask", mask, persistent=False)
        # Also with groups innermost: the result of `where` takes its memory format from the mask.
        self.register_buffer("_mask_last", mask.movedim(0, -1).contiguous().movedim(-1, 0), persistent=False)
        for name, values in zip(("group", "row", "column"), zip(*places, strict=True), strict=True):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def choose(self, chosen: Tensor, others: Tensor, parts: int = 1) -> Tensor:
        """`chosen` at the positions, `others` elsewhere; both grids."""
        cells = torch.where(self.mask(others), self.cells(chosen, parts), self.cells(others, parts))
        return _from_cells(cells)

    def mask(self, x: Tensor) -> Tensor:
        """Boolean mask of `cells(x)`: (8, 1, 1, cell, 1, cell)."""
        return self._mask_last if memory_format_of(x) == torch.channels_last else self._mask

    def take(self, x: Tensor) -> Tensor:
        """The packed values of a grid."""
        return self.cells(x)[:, 0, self.group, :, :, self.row, :, self.column]

    def put(self, values: Tensor, x: Tensor) -> Tensor:
        """A copy of the grid `x` with packed `values` at the positions."""
        x = x.clone(memory_format=memory_format_of(x))
        self.cells(x)[:, 0, self.group, :, :, self.row, :, self.column] = values
        return x

    def cells(self, x: Tensor, parts: int = 1) -> Tensor:
        """A grid as (B, parts, 8, C, H/cell, cell, W/cell, cell); a view."""
        channels = x.shape[1] // GROUPS // parts
        return x.unflatten(3, (-1, self.cell)).unflatten(2, (-1, self.cell)).unflatten(1, (parts, GROUPS, channels))


def _from_cells(cells: Tensor) -> Tensor:
    """The inverse of `Positions.cells`."""
    return normalize_strides(cells.flatten(6, 7).flatten(4, 5).flatten(1, 3))


class Scale(nn.Module):
    """One resolution of y: the subgrid of the coarser scale on it, and the steps that code the rest."""

    def __init__(self, subgrid: tuple[Offset, ...] | None, cell: int, steps: list[tuple]) -> None:
        super().__init__()
        self.subgrid = None if subgrid is None else Positions(2, tuple((offset,) for offset in subgrid))
        self.steps = cast("Sequence[Positions]", nn.ModuleList(Positions(cell, offsets) for offsets in steps))

    def coarsen(self, x: Tensor, parts: int = 1) -> Tensor:
        """The values of `x` (B, parts·M, H, W) on the subgrid: (B, parts·M, H/2, W/2)."""
        assert self.subgrid is not None
        # One of the four values of a cell is kept, so the sum is exact.
        cells = torch.where(self.subgrid.mask(x), self.subgrid.cells(x, parts), 0.0)
        coarse = cells.sum(dim=(5, 7)).flatten(1, 3)
        return normalize_strides(coarse.contiguous(memory_format=memory_format_of(x)))

    def refine(self, coarse: Tensor, fine: Tensor, parts: int = 1) -> Tensor:
        """A copy of `fine` (B, parts·M, H, W) with `coarse` (B, parts·M, H/2, W/2) on the subgrid."""
        assert self.subgrid is not None
        repeated = coarse.unflatten(1, (parts, GROUPS, -1))[:, :, :, :, :, None, :, None]
        return _from_cells(torch.where(self.subgrid.mask(fine), repeated, self.subgrid.cells(fine, parts)))


class CodingOrder(nn.Module):
    """The scales from coarse to fine. Sides of y are multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        s1, s2 = Scale(None, 2, _steps_s1()), Scale(_SUBGRID_S2, 2, _steps_s2())
        s3 = Scale(_SUBGRID_S3, 4, _steps_s3())
        self.scales = cast("Sequence[Scale]", nn.ModuleList([s1, s2, s3]))

    @property
    def step_count(self) -> int:
        """Steps of all scales."""
        return sum(len(scale.steps) for scale in self.scales)

    def grids(self, y: Tensor, parts: int = 1) -> list[Tensor]:
        """y (B, parts·M, H, W) at every scale, coarse to fine: (B, parts·M, H/4, W/4), …, y itself."""
        grids = [y]
        for scale in reversed(self.scales[1:]):
            grids.append(scale.coarsen(grids[-1], parts))
        return grids[::-1]

    def split(self, y: Tensor) -> list[Tensor]:
        """The values of y (B, M, H, W) in coding order: one packed tensor per step."""
        grids = self.grids(y)
        return [step.take(grid) for scale, grid in zip(self.scales, grids, strict=True) for step in scale.steps]


# The subgrid of a scale on the next finer one, for each channel group.
_SUBGRID_S3: tuple[Offset, ...] = ((0, 0), (1, 1), (0, 1), (1, 0)) * 2
_SUBGRID_S2: tuple[Offset, ...] = tuple(offset for offset in ((0, 0), (0, 1), (1, 0), (1, 1)) for _ in range(2))


def _steps_s1() -> list[tuple]:
    checkerboards = (((0, 0), (1, 1)), ((0, 1), (1, 0)))
    return [tuple(checkerboards[(group // 4 + step) % 2] for group in range(GROUPS)) for step in (0, 1)]


def _steps_s2() -> list[tuple]:
    corner = {"a": (0, 0), "b": (0, 1), "c": (1, 0), "d": (1, 1)}
    return [tuple((corner[rows[group // 2]],) for group in range(GROUPS)) for rows in ("dcba", "cdab", "badc")]


def _steps_s3() -> list[tuple]:
    pairs = (
        ((0, 0), (2, 2)),
        ((0, 2), (2, 0)),
        ((1, 1), (3, 3)),
        ((1, 3), (3, 1)),
        ((0, 1), (2, 3)),
        ((0, 3), (2, 1)),
        ((1, 0), (3, 2)),
        ((1, 2), (3, 0)),
    )
    rows = ("24603571", "35712460", "46025713", "57134602", "60247135", "71356024")
    return [tuple(pairs[int(index)] for index in row) for row in rows]


def misplaced(hyper: Tensor) -> Tensor:
    """Hyper parameters at s2 as the public implementation misplaces them (`hyper_placement: upstream`).

    It lists, in row-major order, the values outside a wrong s1 (groups 0-3 omit (0,0), groups 4-7 omit (0,1) of each
    2×2) and fills the true remaining positions with that list. A pair of rows has as many values in both, so the list
    stays within it. `hyper`: (B, M, H, W) on the grid of s2, H and W even; values on the true s1 are not used.
    """
    groups = hyper.unflatten(1, (GROUPS, -1)).unflatten(3, (-1, 2))  # B, g, C, H/2, 2, W
    half = hyper.shape[3] // 2
    # Groups 2, 3 omit (0,1): even rows are shifted by one column.
    even, odd = groups[:, 2:4].unbind(4)
    shifted = torch.stack([even[..., 1::2].repeat_interleave(2, dim=-1), odd], dim=4)
    # Groups 4-7: half of the even row and the odd row fill the even row and half of the odd row.
    even, odd = groups[:, 4:].unbind(4)
    run = torch.stack(
        [
            torch.cat([even[..., 0::2], odd[..., :half]], dim=-1),
            odd[..., half:].repeat_interleave(2, dim=-1),
        ],
        dim=4,
    )
    return torch.cat([groups[:, :2], shifted, run], dim=1).flatten(3, 4).flatten(1, 2)
