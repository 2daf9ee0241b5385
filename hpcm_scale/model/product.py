"""The matrix product behind a 1×1 convolution."""

from __future__ import annotations

import torch
from torch import Tensor

# torch's own, by name: ZeRO-3 puts one of two operations in the place of F.linear, for the rest of the process.
from torch.nn.functional import linear


def product(x: Tensor, weight: Tensor, bias: Tensor, cast: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x·weightᵀ + bias for x (…, I), weight (O, I, 1, 1) and bias (O,): (…, O), in the dtype of `x`.

    `cast`: weight and bias in that dtype, if they are there already (`layers.cast_once`); they get no gradients.

    For the backward pass it keeps `x` and the cast weight, or the weight itself. Autocast would keep a copy of the
    weight for every use of it, of which the context model makes ten; and a view of it would keep alive what ZeRO-3 has
    gathered. So the gradients of a weight that is used often are added up in its own dtype, too.
    """
    return _Product.apply(x, weight, bias, *(cast or (None, None)))


def sums_are_kept(x: Tensor) -> bool:
    """Whether a matrix product of bf16 numbers can give its fp32 sums as they are; on CPUs and under ROCm it cannot."""
    return x.is_cuda and torch.version.hip is None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, cast_weight: Tensor | None, cast_bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight if cast_weight is None else cast_weight)
        ctx.dtype = weight.dtype
        if cast_weight is None:
            cast_weight, cast_bias = weight.to(x.dtype), bias.to(x.dtype)
        return linear(x, cast_weight.flatten(1), cast_bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = (rows @ weight.flatten(1).to(x.dtype)).view(x.shape)
        if ctx.needs_input_grad[1]:
            of_weight = _sums(rows.t(), x.flatten(0, -2), ctx.dtype).view(weight.shape)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(dim=0, dtype=ctx.dtype)
        return of_x, of_weight, of_bias, None, None


def _sums(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of two matrices of one dtype, in another."""
    if a.dtype != dtype and sums_are_kept(a):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)
