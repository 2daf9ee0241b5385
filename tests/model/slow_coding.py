"""The coding order and the context model, position by position, from their description alone.

Slow and obvious: every table is written as the description words it and every position is visited by a
loop; of the fast implementation only the networks themselves are used.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

GROUPS = 8
S3_SUBGRID = [(0, 0), (1, 1), (0, 1), (1, 0), (0, 0), (1, 1), (0, 1), (1, 0)]
S2_SUBGRID = [(0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 0), (1, 1), (1, 1)]
A, B, C, D = (0, 0), (0, 1), (1, 0), (1, 1)
S2_STEPS = [(D, C, B, A), (C, D, A, B), (B, A, D, C)]
PAIRS = [
    [(0, 0), (2, 2)],
    [(0, 2), (2, 0)],
    [(1, 1), (3, 3)],
    [(1, 3), (3, 1)],
    [(0, 1), (2, 3)],
    [(0, 3), (2, 1)],
    [(1, 0), (3, 2)],
    [(1, 2), (3, 0)],
]
S3_STEPS = [
    (2, 4, 6, 0, 3, 5, 7, 1),
    (3, 5, 7, 1, 2, 4, 6, 0),
    (4, 6, 0, 2, 5, 7, 1, 3),
    (5, 7, 1, 3, 4, 6, 0, 2),
    (6, 0, 2, 4, 7, 1, 3, 5),
    (7, 1, 3, 5, 6, 0, 2, 4),
]


def group_of(channel: int, channels: int) -> int:
    return channel // (channels // GROUPS)


def coded_now(level: int, step: int, group: int, row: int, col: int) -> bool:
    """Whether step `step` of scale `level` (0: s1, 1: s2, 2: s3) codes this position of the scale's grid."""
    if level == 0:
        on_diagonal = (row % 2, col % 2) in [(0, 0), (1, 1)]
        first_half = group < 4
        return on_diagonal == (first_half == (step == 0))
    if level == 1:
        return (row % 2, col % 2) == S2_STEPS[step][group // 2]
    return (row % 4, col % 4) in PAIRS[S3_STEPS[step][group]]


def steps_of(level: int) -> int:
    return (2, 3, 6)[level]


def to_finer(level: int, group: int, row: int, col: int) -> tuple[int, int]:
    """Where a position of scale `level` lies on the grid of scale `level` + 1."""
    dr, dc = (S2_SUBGRID, S3_SUBGRID)[level][group]
    return 2 * row + dr, 2 * col + dc


def to_y(level: int, group: int, row: int, col: int) -> tuple[int, int]:
    """Where a position of scale `level` lies in y."""
    for finer in range(level, 2):
        row, col = to_finer(finer, group, row, col)
    return row, col


def step_map(channels: int, height: int, width: int) -> Tensor:
    """The number of the step that codes each position of y, (channels, height, width); asserts once each."""
    steps = torch.full((channels, height, width), -1)
    number = 0
    for level in range(3):
        shrink = 2 ** (2 - level)
        for step in range(steps_of(level)):
            for channel, row, col in product(range(channels), range(height // shrink), range(width // shrink)):
                group = group_of(channel, channels)
                if coded_now(level, step, group, row, col):
                    place = (channel, *to_y(level, group, row, col))
                    assert steps[place] == -1, f"{place} is coded twice"
                    steps[place] = number
            number += 1
    return steps


def traverse(context_model, hyper: Tensor, y: Tensor, upstream: bool) -> Tensor:
    """ŷ (M, H, W) of y (M, H, W), given the hyper parameters (2M, H, W); all float64."""
    channels, height, width = y.shape
    y_hat_fine = context = parameters = None
    number = 0
    for level in range(3):
        shrink = 2 ** (2 - level)
        rows, cols = height // shrink, width // shrink
        here = _picture(hyper, channels, level, rows, cols)
        values = _picture(y, channels, level, rows, cols)
        prior = context_model.prior_s3 if level == 2 else context_model.prior_s1_s2
        y_hat = torch.zeros_like(values)
        if level == 0:
            context = parameters = here
        else:
            y_hat, context = _finer(level, y_hat_fine, context, here, channels, upstream)
            context = context_model.merge[level - 1](context[None])[0]
        for step in range(steps_of(level)):
            if number > 0:
                # s1 has one network for its second step; s2 and s3 have one for each.
                adaptor = context_model.adaptors[level][step - 1 if level == 0 else step]
                adapted = adaptor(torch.cat([context, y_hat])[None])
                parameters = prior.after(context_model.q[number - 1](prior.before(adapted)))[0]
                fusion = context_model.fusion[level] if len(context_model.fusion) else None
                context = fusion(parameters[None], context[None])[0] if fusion else parameters
            decoded = y_hat.clone()
            for channel, row, col in product(range(channels), range(rows), range(cols)):
                if coded_now(level, step, group_of(channel, channels), row, col):
                    mean = parameters[channels + channel, row, col]
                    decoded[channel, row, col] = (values[channel, row, col] - mean).round() + mean
            y_hat = decoded
            number += 1
        y_hat_fine = y_hat
    return y_hat


def _picture(x: Tensor, channels: int, level: int, rows: int, cols: int) -> Tensor:
    """The values of x (k·channels, H, W) at the positions of a scale."""
    picture = x.new_zeros(x.shape[0], rows, cols)
    for channel, row, col in product(range(x.shape[0]), range(rows), range(cols)):
        group = group_of(channel % channels, channels)
        r, c = to_y(level, group, row, col)
        picture[channel, row, col] = x[channel, r, c]
    return picture


def _finer(level, y_hat, context, hyper, channels, upstream):
    """ŷ and context of the coarser scale on the finer grid, hyper parameters on the other positions."""
    _, rows, cols = hyper.shape
    fine_y = hyper.new_zeros(channels, rows, cols)
    fine = torch.zeros_like(hyper)
    for channel in range(hyper.shape[0]):
        group = group_of(channel % channels, channels)
        coarse = {
            to_finer(level - 1, group, row, col): (row, col) for row, col in product(range(rows // 2), range(cols // 2))
        }
        remaining = [place for place in product(range(rows), range(cols)) if place not in coarse]
        source = remaining
        if upstream and level == 1:
            wrong = (0, 0) if group < 4 else (0, 1)
            source = [place for place in product(range(rows), range(cols)) if (place[0] % 2, place[1] % 2) != wrong]
        for place, value_at in zip(remaining, source, strict=True):
            fine[(channel, *place)] = hyper[(channel, *value_at)]
        for place, origin in coarse.items():
            fine[(channel, *place)] = context[(channel, *origin)]
            if channel < channels:
                fine_y[(channel, *place)] = y_hat[(channel, *origin)]
    return fine_y, fine
