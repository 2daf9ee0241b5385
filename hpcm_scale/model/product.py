"""The matrix product behind a 1×1 convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x·weightᵀ + bias for x (…, I), weight (O, I, 1, 1) and bias (O,): (…, O), in the dtype of `x`.

    For the backward pass it keeps `x` and the weight itself. Autocast would keep a copy of the weight for every use
    of it, of which the context model makes ten; and a view of it would keep alive what ZeRO-3 has gathered. So the
    gradients of a weight that is used often are added up in its own dtype, too.
    """
    return _Product.apply(x, weight, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.flatten(1).to(x.dtype), bias.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        of_x = gradient @ weight.flatten(1).to(x.dtype) if ctx.needs_input_grad[0] else None
        rows = gradient.flatten(0, -2)
        of_weight = (rows.t() @ x.flatten(0, -2)).to(weight.dtype).view_as(weight)
        return of_x, of_weight, rows.sum(dim=0, dtype=weight.dtype)
