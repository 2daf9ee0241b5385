"""Kernels and memory formats: how a layer computes on its device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import linear


class Kernels(Enum):
    """Which kernels the layers use."""

    fastest = "fastest"
    """The fastest for the device and memory format of the input."""
    reference = "reference"
    """torch's own convolutions, LeakyReLU and attention, to compare with; inputs in the contiguous format."""
    cuda = "cuda"
    """Those of an NVIDIA GPU on any device: fake tensors show what a GPU would launch and store."""


_kernels = Kernels.fastest


@contextmanager
def use_kernels(kernels: Kernels) -> Iterator[None]:
    """Layers use these kernels in this context."""
    global _kernels
    before, _kernels = _kernels, kernels
    try:
        yield
    finally:
        _kernels = before


def kernels_in_use() -> Kernels:
    """The kernels that `use_kernels` has set."""
    return _kernels


# Memory formats.


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Channels-last or contiguous, for (B, C, H, W) or a slice of its channels, where torch's answer is wrong."""
    return torch.channels_last if x.stride(1) == 1 else torch.contiguous_format


def normalize_strides(x: Tensor) -> Tensor:
    """The same tensor (B, C, H, W), dense.

    The first stride of a single image has no meaning, but torch chooses the memory format of later results by it.
    """
    if len(x) > 1 or memory_format_of(x) != torch.channels_last:
        return x
    return x.squeeze(0).permute(1, 2, 0)[None].permute(0, 3, 1, 2)


# oneDNN's 1×1 convolutions with fused activation or addition, without gradients on a CPU. torch.compile makes the same
# calls; torch's eager kernels are slower for a single image on a single core.

_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
_GEOMETRY = ([0, 0], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups


def can_fuse(x: Tensor, weight: Tensor) -> bool:
    """Whether `fused_convolution` supports these: fp32, channels-last, on a CPU, without gradients."""
    return (
        _AVAILABLE
        and _kernels == Kernels.fastest
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def fused_convolution(x: Tensor, layer: nn.Conv2d, slope: float | None = None, onto: Tensor | None = None) -> Tensor:
    """A 1×1 convolution, followed by LeakyReLU of `slope` or by addition to `onto` (not both)."""
    assert slope is None or onto is None
    if onto is not None:
        fused = torch.ops.mkldnn._convolution_pointwise.binary
        return fused(x, onto, layer.weight, layer.bias, *_GEOMETRY, "add", None, None, [], None)
    after = ("none", []) if slope is None else ("leaky_relu", [slope])
    return torch.ops.mkldnn._convolution_pointwise(x, layer.weight, layer.bias, *_GEOMETRY, *after, "")


# 1×1 convolutions as matrix products.


def product(x: Tensor, weight: Tensor, bias: Tensor, cast: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x·weightᵀ + bias for x (…, I), weight (O, I, 1, 1) and bias (O,): (…, O), in the dtype of `x`.

    `cast`: weight and bias in that dtype, if they exist already (`layers.cast_once`); they get no gradients.

    Saves `x` and the cast weight, or the weight itself, for the backward pass. Autocast would save a copy of the weight
    at each use, of which the context model makes ten; a view would keep alive what ZeRO-3 has gathered. Gradients of a
    weight with several uses are summed in its own dtype.
    """
    return _Product.apply(x, weight, bias, *(cast or (None, None)))


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
            of_weight = _matmul(rows.t(), x.flatten(0, -2), ctx.dtype).view(weight.shape)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(dim=0, dtype=ctx.dtype)
        return of_x, of_weight, of_bias, None, None


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The product of two matrices of one dtype, in another; on CUDA, not under ROCm, the fp32 sums themselves."""
    if a.dtype != dtype and (_kernels == Kernels.cuda or (a.is_cuda and torch.version.hip is None)):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


# Attention.


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of (…, positions, d) each.

    `bias`, which broadcasts to (…, positions, positions), is added to the logits.
    """
    bias = None if bias is None else bias.to(query.dtype)
    if _kernels == Kernels.cuda:
        return efficient_attention(query, key, value, bias)
    if _kernels == Kernels.fastest and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        # With few positions torch's kernel for bf16 on a CPU is ten times slower than matrix products.
        weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        weights = weights if bias is None else weights + bias
        return weights.softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value, bias)


def efficient_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention as the one operation that torch runs on a GPU; fake tensors on a CPU would decompose it."""
    bias = None if bias is None else bias.expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]
