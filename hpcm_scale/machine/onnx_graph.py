"""Networks from ONNX files, evaluated by torch, with gradients."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcm_scale.errors import UserError
from hpcm_scale.machine.extractor import REMEDY, required

# ONNX operators of opsets 11 and 12 (https://onnx.ai/onnx/operators) in torch.
#
# Each takes the inputs of a node, None if omitted, and its attributes as keywords. Integers are tensors on the CPU, and
# floating-point scalars are Python numbers.


_TYPES = {1: torch.float32, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64}
"""By `TensorProto.DataType`."""


def _average_pool(
    x: Tensor,
    kernel_shape: list[int],
    strides: tuple[int, ...] = (1, 1),
    pads: tuple[int, ...] = (0, 0, 0, 0),
    ceil_mode: int = 0,
    count_include_pad: int = 0,
) -> Tensor:
    top, left, bottom, right = pads
    assert (top, left) == (bottom, right), "torch averages only over symmetric padding"
    return F.avg_pool2d(x, kernel_shape, strides, (top, left), bool(ceil_mode), bool(count_include_pad))


def _batch_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float = 1e-5, momentum: float = 0.9
) -> Tensor:
    # The gradient of torch 2.13's batch_norm is wrong for one image with strides such as (120, 1, 1320, 120).
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
) -> tuple[int, ...]:
    """Top, left, bottom, right; automatic padding gives an output of ⌈side / stride⌉."""
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
    """Over all axes from `axis` on, as in these opsets."""
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
"""By ONNX name; convolutions and pooling are two-dimensional."""


OPSETS = (11, 12)
"""Supported versions of the ONNX operators."""


@dataclass(frozen=True)
class Node:
    """An operation, the names of its inputs ("" if omitted) and of its output."""

    operation: str
    function: Callable[..., Tensor]
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


class OnnxGraph(nn.Module):
    """The graph of an ONNX file (https://onnx.ai/onnx/repo-docs/IR.html) with one input.

    Weights are buffers. Integers, which shapes are computed from, stay on the CPU, so that the graph also runs on
    `meta`. Raises UserError for a damaged file and for unsupported operations.
    """

    def __init__(self, path: str | Path, needed_by: str) -> None:
        super().__init__()
        model, constants = _read(path, needed_by)
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        """Metadata of the file."""
        self.nodes = [_node(node, path, needed_by) for node in model.graph.node if node.op_type != "Constant"]
        """In topological order."""
        (self.input,) = (value.name for value in model.graph.input if value.name not in constants)
        self.numbers: dict[str, Tensor | float] = {}
        self.weights: dict[str, str] = {}
        for i, (name, value) in enumerate(constants.items()):
            if value.is_floating_point() and value.dim() > 0:
                self.weights[name] = f"weight{i}"  # names in the file may have dots, which torch's cannot
                self.register_buffer(self.weights[name], value)
            else:
                self.numbers[name] = value.item() if value.is_floating_point() else value

    def forward(self, x: Tensor, outputs: tuple[str, ...]) -> list[Tensor]:
        """The values named `outputs` for the input `x`; computes only what these need, and frees it early."""
        values: dict[str, Any] = self.numbers | {name: getattr(self, weight) for name, weight in self.weights.items()}
        values |= {self.input: x, "": None}
        for node, read_last in self._plan(outputs):
            values[node.output] = node.function(*(values[name] for name in node.inputs), **node.attributes)
            for name in read_last:
                values.pop(name, None)
        return [values[name] for name in outputs]

    def find(self, operation: str) -> list[Node]:
        """The nodes of an operation, such as "MatMul", in topological order."""
        return [node for node in self.nodes if node.operation == operation]

    def _plan(self, outputs: tuple[str, ...]) -> list[tuple[Node, set[str]]]:
        """The nodes that `outputs` need, each with the inputs that no later node needs."""
        needed, plan = {*outputs, ""}, []
        for node in reversed(self.nodes):
            if node.output in needed:
                plan.append((node, set(node.inputs) - needed))
                needed.update(node.inputs)
        return plan[::-1]


def _read(path: str | Path, needed_by: str) -> tuple[Any, dict[str, Tensor]]:
    """The ONNX model, and its constants by name."""
    onnx = required(needed_by, "onnx", "onnx")
    try:
        model = onnx.load(path)
    except Exception as error:  # errors of the protobuf library, which vary
        raise UserError(
            "damaged-onnx", "machine.receivers", f"{path} is not a readable ONNX file; {REMEDY} again"
        ) from error
    versions = {entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")}
    if not versions or not versions <= set(OPSETS):
        theirs, known = (" and ".join(map(str, of)) for of in (sorted(versions), OPSETS))
        raise UserError(
            "unsupported-onnx-version",
            "machine.receivers",
            f"{path} uses ONNX operators of version {theirs}, but {needed_by} needs versions {known}; {REMEDY} again",
        )
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = onnx.helper.get_attribute_value(node.attribute[0])
    arrays = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in constants.items()}
    return model, {name: torch.tensor(array) for name, array in arrays.items()}


def _node(node: Any, path: str | Path, needed_by: str) -> Node:
    onnx = required(needed_by, "onnx", "onnx")
    attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    function = OPERATIONS.get(node.op_type)
    if function is None:
        raise UserError(
            "unsupported-onnx-operation",
            "machine.receivers",
            f"{path} has the operation {node.op_type}, which {needed_by} does not support; {REMEDY} again",
        )
    try:
        inspect.signature(function).bind(*node.input, **attributes)
    except TypeError as error:
        raise UserError(
            "unsupported-onnx-attributes",
            "machine.receivers",
            f"{path} has the operation {node.op_type} with unsupported attributes ({error}); {REMEDY} again",
        ) from error
    (output,) = node.output
    return Node(node.op_type, function, tuple(node.input), output, attributes)
