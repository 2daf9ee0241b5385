"""Floating-point operations of a model, counted on the `meta` device: no memory, no arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

TRAINING_FACTOR = 3
"""Model FLOPs of a training step per forward FLOPs: backward is taken as twice forward.

torch's own count of the backward pass is not used: its formula for the weight gradient of a grouped
convolution forgets the groups, which overstates this family by about 40 %. Counted right, backward is
1.984 (68m) to 2.000 (1b) times forward.
"""

aten = torch.ops.aten
_MOVEMENT = {aten.index_copy, aten.copy_, aten.embedding}
_PRODUCTS = {aten.mv, aten.addmv, aten.dot, aten.vdot}  # of vectors; torch has no formula for them


class _RefuseUnknown(TorchDispatchMode):
    """An operation on several matrices, or a product, that has no formula must not count as nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        packet = func._overloadpacket
        free = torch.Tag.pointwise in func.tags or func.is_view or packet in _MOVEMENT
        matrices = sum(isinstance(argument, Tensor) and argument.dim() > 1 for argument in args)
        if packet in _PRODUCTS or (not free and matrices > 1 and packet not in flop_registry):
            raise ValueError(f"{func} has no FLOP formula; add it to hpcm_scale/compute/flops.py")
        return func(*args, **(kwargs or {}))


def forward_flops(module: nn.Module, *inputs: Tensor) -> int:
    """FLOPs (2 per multiply-accumulate) of one forward pass of a module built on `meta`.

    Convolutions, matrix products and attention count; element-wise operations do not. Raises
    ValueError for an operation on several matrices that is neither known to be free nor has a formula.
    """
    assert all(tensor.is_meta for tensor in inputs), "attention counts 0 on other devices"
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _RefuseUnknown():
        module(*inputs)
    return counter.get_total_flops()
