"""Which positions of y are coded when (arXiv 2507.19125, section III).

y is coded in three scales, each a half-resolution picture of the next: s1, s2, s3 = y itself. Every
scale is coded in steps; at a step each of the eight channel groups has its own positions, the same
in every cell of the grid. Nothing here depends on data: a set of positions is a constant gather.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROUPS = 8
Offset = tuple[int, int]


class Positions(nn.Module):
    """A constant set of positions on a grid: for each channel group, offsets (row, column) in a cell.

    Tensors on the grid are (B, 8·C, H, W) with H and W multiples of the cell; the values at the
    positions are "packed": (8·offsets, B, C, H/cell, W/cell), groups outermost.
    """

    def __init__(self, cell: int, offsets: tuple[tuple[Offset, ...], ...]) -> None:
        super().__init__()
        assert len(offsets) == GROUPS and len({len(group) for group in offsets}) == 1
        self.cell, self.offsets = cell, offsets
        planes = [g * cell**2 + row * cell + col for g, group in enumerate(offsets) for row, col in group]
        self.register_buffer("planes", torch.tensor(planes), persistent=False)

    def take(self, x: Tensor) -> Tensor:
        """The packed values of a grid."""
        return self._split(x).index_select(0, self.planes)

    def put(self, values: Tensor, x: Tensor) -> Tensor:
        """A copy of the grid `x` with packed `values` at the positions."""
        batch, channels, height, width = x.shape
        planes = self._split(x).index_copy(0, self.planes, values)
        cells = planes.unflatten(0, (GROUPS, self.cell, self.cell))  # g, r, c, B, C, h, w
        return cells.permute(3, 0, 4, 5, 1, 6, 2).reshape(batch, channels, height, width)

    def _split(self, x: Tensor) -> Tensor:
        """Every offset of every group as a plane of its own: (8·cell², B, C, H/cell, W/cell)."""
        batch, channels, height, width = x.shape
        shape = (batch, GROUPS, channels // GROUPS, height // self.cell, self.cell, width // self.cell)
        return x.reshape(*shape, self.cell).permute(1, 4, 6, 0, 2, 3, 5).flatten(0, 2)


class Scale(nn.Module):
    """One resolution of y: where the coarser scale lies on it, and the steps that code the rest."""

    def __init__(self, subgrid: tuple[Offset, ...] | None, cell: int, steps: list[tuple]) -> None:
        super().__init__()
        self.subgrid = None if subgrid is None else Positions(2, tuple((offset,) for offset in subgrid))
        self.steps = nn.ModuleList(Positions(cell, offsets) for offsets in steps)

    def coarsen(self, x: Tensor) -> Tensor:
        """The coarser scale's picture of `x`: (B, M, H, W) to (B, M, H/2, W/2)."""
        height, width = x.shape[2] // 2, x.shape[3] // 2
        return self.subgrid.take(x).transpose(0, 1).reshape(*x.shape[:2], height, width)

    def refine(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """A copy of `fine` (B, M, H, W) with `coarse` (B, M, H/2, W/2) on the subgrid."""
        return self.subgrid.put(coarse.unflatten(1, (GROUPS, -1)).transpose(0, 1), fine)


class CodingOrder(nn.Module):
    """The scales from coarse to fine. Sides of y are multiples of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            [
                Scale(None, 2, _steps_s1()),
                Scale(_SUBGRID_S2, 2, _steps_s2()),
                Scale(_SUBGRID_S3, 4, _steps_s3()),
            ]
        )

    def grids(self, y: Tensor) -> list[Tensor]:
        """y (B, M, H, W) at every scale, coarse to fine: (B, M, H/4, W/4), …, y itself."""
        grids = [y]
        for scale in reversed(self.scales[1:]):
            grids.append(scale.coarsen(grids[-1]))
        return grids[::-1]

    def split(self, y: Tensor) -> list[Tensor]:
        """The values of y (B, M, H, W) in coding order: one packed tensor per step."""
        grids = self.grids(y)
        return [step.take(grid) for scale, grid in zip(self.scales, grids, strict=True) for step in scale.steps]

    def join(self, packed: list[Tensor]) -> Tensor:
        """The inverse of `split`."""
        values, grid = iter(packed), None
        for scale in self.scales:
            first = next(values)
            _, batch, channels, height, width = first.shape
            cell = scale.steps[0].cell
            shape = (batch, GROUPS * channels, height * cell, width * cell)
            empty = first.new_zeros(shape)
            grid = empty if grid is None else scale.refine(grid, empty)
            grid = scale.steps[0].put(first, grid)
            for step in scale.steps[1:]:
                grid = step.put(next(values), grid)
        return grid


# Where a scale lies on the next finer one, for each channel group.
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
    """The hyper parameters at s2 as the public implementation lays them (`hyper_placement: upstream`).

    It lists, row by row, the values outside a wrong s1 (groups 0-3 leave out (0,0), groups 4-7 (0,1)
    of each 2×2) and fills the true remaining positions with that list. Two rows hold equally many in
    both, so the list never leaves its pair of rows. Values on the true s1 are never read.
    `hyper`: (B, M, H, W) on the grid of s2, H and W even.
    """
    groups = hyper.unflatten(1, (GROUPS, -1)).unflatten(3, (-1, 2))  # B, g, C, H/2, 2, W
    half = hyper.shape[3] // 2
    # Groups 2, 3 leave out (0,1): their even rows are read one column off.
    even, odd = groups[:, 2:4].unbind(4)
    shifted = torch.stack([even[..., 1::2].repeat_interleave(2, dim=-1), odd], dim=4)
    # Groups 4-7: a half row from the even row, then the whole odd row, into a whole even and a half odd row.
    even, odd = groups[:, 4:].unbind(4)
    run = torch.stack(
        [
            torch.cat([even[..., 0::2], odd[..., :half]], dim=-1),
            odd[..., half:].repeat_interleave(2, dim=-1),
        ],
        dim=4,
    )
    return torch.cat([groups[:, :2], shifted, run], dim=1).flatten(3, 4).flatten(1, 2)
