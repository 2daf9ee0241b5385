"""Networks from ONNX files, computed by torch, so that gradients pass through them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcm_scale.errors import UserError
from hpcm_scale.machine.onnx_operations import OPERATIONS
from hpcm_scale.machine.packages import MEND, required

OPSETS = (11, 12)
"""Versions of the ONNX operators that `onnx_operations` follows."""


@dataclass(frozen=True)
class Node:
    """An operation of a graph: the names of what goes in, where nothing goes in as "", and of what comes out."""

    operation: str
    function: Callable[..., Tensor]
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]


class OnnxGraph(nn.Module):
    """The graph of an ONNX file (https://onnx.ai/onnx/repo-docs/IR.html) with one input.

    Its weights are buffers. Numbers that only shapes are made of stay on the CPU, so that the graph can be computed on
    `meta`, too. Raises UserError for a file that cannot be read, and for one that asks for what is not known here.
    """

    def __init__(self, path: str | Path, needed_by: str) -> None:
        super().__init__()
        model, constants = _read(path, needed_by)
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}
        """What the file says about itself."""
        self.nodes = [_node(node, path, needed_by) for node in model.graph.node if node.op_type != "Constant"]
        """In the order in which they can be computed."""
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
        """The values of those names for the input `x`; computes only what they need, and keeps it no longer."""
        values = self.numbers | {name: getattr(self, weight) for name, weight in self.weights.items()}
        values |= {self.input: x, "": None}
        for node, read_last in self._plan(outputs):
            values[node.output] = node.function(*(values[name] for name in node.inputs), **node.attributes)
            for name in read_last:
                values.pop(name, None)
        return [values[name] for name in outputs]

    def find(self, operation: str) -> list[Node]:
        """The nodes of that operation, such as "MatMul", in the order of the graph."""
        return [node for node in self.nodes if node.operation == operation]

    def _plan(self, outputs: tuple[str, ...]) -> list[tuple[Node, set[str]]]:
        """The nodes that `outputs` need, each with those of its inputs that no later one needs."""
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
    except Exception as error:  # of the protobuf library, whichever that is
        raise UserError(f"{path} is not a readable ONNX file; {MEND} again") from error
    versions = {entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")}
    if not versions or not versions <= set(OPSETS):
        theirs, known = (" and ".join(map(str, of)) for of in (sorted(versions), OPSETS))
        raise UserError(f"{path} uses the operators of ONNX version {theirs}; {needed_by} reads versions {known}")
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
        raise UserError(f"{path} has the operation {node.op_type}, which {needed_by} does not know")
    try:
        inspect.signature(function).bind(*node.input, **attributes)
    except TypeError as error:
        raise UserError(f"{path} has a {node.op_type} that {needed_by} does not know ({error})") from error
    (output,) = node.output
    return Node(node.op_type, function, tuple(node.input), output, attributes)
