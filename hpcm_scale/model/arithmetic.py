"""Kernels and memory formats: how a layer computes on the device it runs on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# In which order a picture's numbers lie in memory.


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Channels-last or plain, for (B, C, H, W) or a slice of its channels; torch's own answer errs for both."""
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


def settled(x: Tensor) -> Tensor:
    """The same tensor (B, C, H, W), dense.

    The first stride of a single image means nothing, but torch chooses the memory format of what follows by it.
    """
    if len(x) > 1 or memory_format_of(x) != torch.channels_last:
        return x
    return x.squeeze(0).permute(1, 2, 0)[None].permute(0, 3, 1, 2)


# 1×1 convolutions without gradients on a CPU, with what follows each in the same pass over memory.
#
# The operations are those that torch.compile makes of such layers; asked for by name they need no compiler. torch
# itself takes slower ones for a single image on a single core.


_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
_GEOMETRY = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups


def can_convolve(x: Tensor, weight: Tensor) -> bool:
    """Whether the others can be had: fp32, channels-last, on a CPU, without gradients."""
    return (
        _AVAILABLE
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def convolve(x: Tensor, layer: nn.Conv2d, slope: float | None = None, onto: Tensor | None = None) -> Tensor:
    """A 1×1 convolution; with `slope` LeakyReLU of it; with `onto` added to that (one of the two at a time)."""
    assert slope is None or onto is None
    if onto is not None:
        fused = torch.ops.mkldnn._convolution_pointwise.binary
        return fused(x, onto, layer.weight, layer.bias, *_GEOMETRY, "add", None, None, [], None)
    after = ("none", []) if slope is None else ("leaky_relu", [slope])
    return torch.ops.mkldnn._convolution_pointwise(x, layer.weight, layer.bias, *_GEOMETRY, *after, "")


# The matrix product behind a 1×1 convolution.


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
