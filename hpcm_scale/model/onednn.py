"""1×1 convolutions without gradients on a CPU, with what follows each in the same pass over memory.

The operations are those that torch.compile makes of such layers; asked for by name they need no compiler. torch itself
takes slower ones for a single image on a single core.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
