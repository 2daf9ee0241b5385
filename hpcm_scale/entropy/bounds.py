"""Bounds that keep a value in range without cutting it off from training."""

from __future__ import annotations

import torch
from torch import Tensor


class _LowerBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(value >= bound)
        return value.clamp(min=bound)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (within,) = ctx.saved_tensors
        return torch.where(within | (gradient < 0), gradient, 0.0), None


def lower_bound(value: Tensor, bound: float) -> Tensor:
    """max(value, bound), with a gradient that can bring a value back.

    Below the bound the gradient passes only where descent would raise the value (gradient < 0); a
    plain clamp would leave such a value there for ever. Same shape and dtype as `value`.
    """
    return _LowerBound.apply(value, bound)
