"""Time of a training step by kind of operation, from a profile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch.autograd import DeviceType

from bench.step import OPTIMIZER
from hpcm_scale.entropy import generalized_gaussian

KINDS = (
    "1×1 convolutions, matrix products",
    "3×3 convolutions",
    "depthwise convolutions",
    "strided convolutions",
    "attention",
    "likelihood",
    "element-wise",
    "copies, casts, gathers",
    "compiled element-wise",
    "optimizer",
    "Python, autograd, launching",
)
_PRODUCTS, _SPATIAL, _DEPTHWISE, _STRIDED, _ATTENTION, _LIKELIHOOD, _ELEMENTWISE, _COPIES, _FUSED, _OPTIMIZER, _REST = (
    KINDS
)

_WHOLE = {
    "scaled_dot_product": _ATTENTION,
    "ScaledDotProduct": _ATTENTION,
    OPTIMIZER: _OPTIMIZER,
    **{
        name: _LIKELIHOOD
        for module in (generalized_gaussian,)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, torch.autograd.Function)
    },
}
"""Kind of an operation with all that it calls, by a part of its name."""

_BY_NAME = {
    **dict.fromkeys(("mm", "addmm", "linear", "_mkl_linear", "_linear_pointwise", "mkldnn_linear"), _PRODUCTS),
    # Only attention uses batched matrix products.
    **dict.fromkeys(("bmm", "baddbmm", "_softmax", "_softmax_backward_data"), _ATTENTION),
    **dict.fromkeys(("log2", "expm1", "special_gammainc"), _LIKELIHOOD),
    **dict.fromkeys(("copy_", "_to_copy", "to", "clone", "contiguous", "cat", "fill_", "zero_"), _COPIES),
    **dict.fromkeys(("index_select", "index_copy", "index_copy_", "index_add_", "index", "gather"), _COPIES),
}
"""Kind by operator name without namespace; other operators are element-wise if torch tags them so."""
_FUSED_NAMES = ("cpp_fused", "triton_", "Torch-Compiled Region", "CompiledFunction", "Call CompiledFxGraph")


def seconds_by_kind(events: Iterable[Any], wall: float, device: torch.device) -> dict[str, float]:
    """Seconds of one step by kind, in the order of `KINDS`, from the events of a profile with shapes.

    `wall`: seconds of the whole step. The last kind is the rest: on a CPU the time outside of operations, on a GPU the
    time without a kernel.
    """
    spent = dict.fromkeys(KINDS, 0.0)
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: its time is counted with the operation that launched it
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if own > 0:
            spent[ema_kind(event)] += own / 1e6
    spent[_REST] = max(0.0, wall - sum(seconds for kind, seconds in spent.items() if kind != _REST))
    return spent


def ema_kind(event: Any) -> str:
    """The kind of an operation: by an enclosing operation, the shape of its weights, or its name."""
    for part in _with_parents(event):
        for name, kind in _WHOLE.items():
            if name in part.name:
                return kind
    for part in _with_parents(event):
        kind = _own_kind(part)
        if kind is not None:
            return kind
    return _REST


def _with_parents(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _own_kind(event: Any) -> str | None:
    namespace, _, name = event.name.rpartition("::")
    if namespace in ("aten", "mkldnn") and ("convolution" in name or "conv2d" in name):
        return _kind_of_convolution(event)
    if namespace and name in _BY_NAME:
        return _BY_NAME[name]
    if any(part in name for part in _FUSED_NAMES):
        return _FUSED
    return _ELEMENTWISE if namespace == "aten" and _is_elementwise(name) else None


@cache
def _is_elementwise(name: str) -> bool:
    """Whether a torch operator is element-wise or a reduction."""
    operation = getattr(torch.ops.aten, name.removesuffix("_backward"), None)
    if operation is None:
        return False
    tags = {tag for overload in operation.overloads() for tag in getattr(operation, overload).tags}
    return bool(tags & {torch.Tag.pointwise, torch.Tag.reduction})


def _kind_of_convolution(event: Any) -> str | None:
    """By the kernel: 1×1, depthwise, even sides (which are strided here), or 3×3."""
    position = 2 if "backward" in event.name else 1
    shapes = event.input_shapes
    weight = shapes[position] if shapes and len(shapes) > position else []
    if len(weight) != 4:
        return None
    if weight[2] == 1:
        return _PRODUCTS
    if weight[1] == 1:
        return _DEPTHWISE
    return _STRIDED if weight[2] % 2 == 0 else _SPATIAL
