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


def convolve(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """A 1×1 convolution."""
    return torch.ops.mkldnn._convolution_pointwise(x, layer.weight, layer.bias, *_GEOMETRY, "none", [], "")


def convolve_leaky(x: Tensor, layer: nn.Conv2d, slope: float) -> Tensor:
    """LeakyReLU of a 1×1 convolution."""
    return torch.ops.mkldnn._convolution_pointwise(x, layer.weight, layer.bias, *_GEOMETRY, "leaky_relu", [slope], "")


def convolve_onto(x: Tensor, layer: nn.Conv2d, residual: Tensor) -> Tensor:
    """A residual and a 1×1 convolution."""
    fused = torch.ops.mkldnn._convolution_pointwise.binary
    return fused(x, residual, layer.weight, layer.bias, *_GEOMETRY, "add", None, None, [], None)
