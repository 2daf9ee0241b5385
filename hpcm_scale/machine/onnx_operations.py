"""The operations of ONNX graphs in torch, as https://onnx.ai/onnx/operators defines them in versions 11 and 12.

Each takes the inputs of an ONNX node, `None` where one is left out, and its attributes by their names there. Whole
numbers, of which shapes are made, are tensors on the CPU; single floating-point numbers are plain.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_TYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64}
"""As `TensorProto.DataType` numbers them."""


def _average_pool(
    x: Tensor,
    kernel_shape: list[int],
    strides: tuple[int, ...] = (1, 1),
    pads: tuple[int, ...] = (0, 0, 0, 0),
    ceil_mode: int = 0,
    count_include_pad: int = 0,
) -> Tensor:
    top, left, bottom, right = pads
    assert (top, left) == (bottom, right), "torch averages over even padding only"
    return F.avg_pool2d(x, kernel_shape, strides, (top, left), bool(ceil_mode), bool(count_include_pad))


def _batch_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float = 1e-5, momentum: float = 0.9
) -> Tensor:
    # Not torch 2.13's own: its gradient is wrong for one image with strides such as (120, 1, 1320, 120).
    factor = scale * (variance + epsilon).rsqrt()
    return x * factor[:, None, None] + (bias - mean * factor)[:, None, None]


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_shape: list[int],
    strides: tuple[int, ...] = (1, 1),
    pads: tuple[int, ...] = (0, 0, 0, 0),
    dilations: tuple[int, ...] = (1, 1),
    group: int = 1,
    auto_pad: bytes = b"NOTSET",
) -> Tensor:
    extents = [dilation * (side - 1) + 1 for side, dilation in zip(kernel_shape, dilations, strict=True)]
    top, left, bottom, right = _padding(x, extents, strides, pads, auto_pad)
    if (top, left) == (bottom, right):
        return F.conv2d(x, weight, bias, strides, (top, left), dilations, group)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, strides, 0, dilations, group)


def _max_pool(
    x: Tensor,
    kernel_shape: list[int],
    strides: tuple[int, ...] = (1, 1),
    pads: tuple[int, ...] = (0, 0, 0, 0),
    ceil_mode: int = 0,
    auto_pad: bytes = b"NOTSET",
) -> Tensor:
    top, left, bottom, right = _padding(x, kernel_shape, strides, pads, auto_pad)
    padded = F.pad(x, (left, right, top, bottom), value=-torch.inf)
    return F.max_pool2d(padded, kernel_shape, strides, ceil_mode=bool(ceil_mode))


def _padding(
    x: Tensor, extents: list[int], strides: tuple[int, ...], pads: tuple[int, ...], automatic: bytes
) -> tuple[int, int, int, int]:
    """Top, left, bottom, right; where it is automatic, so much that the result has ⌈side / stride⌉ places."""
    if automatic == b"NOTSET":
        return tuple(pads)
    assert automatic in (b"SAME_UPPER", b"SAME_LOWER"), automatic
    totals = [
        max((-(-side // stride) - 1) * stride + extent - side, 0)
        for side, extent, stride in zip(x.shape[2:], extents, strides, strict=True)
    ]
    less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (*less, *more) if automatic == b"SAME_UPPER" else (*more, *less)


def _hard_sigmoid(x: Tensor, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


def _reduce_mean(x: Tensor, axes: list[int], keepdims: int = 1) -> Tensor:
    return x.mean(axes, keepdim=bool(keepdims))


def _reshape(x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([x.shape[i] if side == 0 else side for i, side in enumerate(shape.tolist())])


def _slice(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor, steps: Tensor | None = None) -> Tensor:
    index = [slice(None)] * x.dim()
    steps = torch.ones_like(starts) if steps is None else steps
    for axis, *bounds in zip(*(part.tolist() for part in (axes, starts, ends, steps)), strict=True):
        index[axis] = slice(*bounds)
    return x[tuple(index)]


def _softmax(x: Tensor, axis: int = 1) -> Tensor:
    """Over all axes from `axis` on, in these versions."""
    return x.flatten(axis).softmax(-1).view_as(x)


def _unsqueeze(x: Tensor, axes: list[int]) -> Tensor:
    for axis in sorted(axes):
        x = x.unsqueeze(axis)
    return x


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "Add": operator.add,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": lambda x, to: x.to(_TYPES[to]),
    "Clip": lambda x, low=None, high=None: x.clamp(low, high),
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Conv": _convolution,
    "Div": operator.truediv,
    "Erf": lambda x: x.erf(),
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "Identity": lambda x: x,
    "MatMul": operator.matmul,
    "MaxPool": _max_pool,
    "Mul": operator.mul,
    "Pow": operator.pow,
    "ReduceMean": _reduce_mean,
    "Relu": lambda x: x.relu(),
    "Reshape": _reshape,
    "Shape": lambda x: torch.tensor(x.shape),
    "Sigmoid": lambda x: x.sigmoid(),
    "Slice": _slice,
    "Softmax": _softmax,
    "Sqrt": lambda x: x.sqrt(),
    "Squeeze": lambda x, axes: x.squeeze(tuple(axes)),
    "Sub": operator.sub,
    "Transpose": lambda x, perm: x.permute(perm),
    "Unsqueeze": _unsqueeze,
}
"""By the names of ONNX; convolutions and pooling in two dimensions."""
