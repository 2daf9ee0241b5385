"""torch.compile by region: residual blocks, attention and rates, each as one graph without breaks.

What lies between them are single convolutions, which are as fast without. Small regions compile in minutes where the
whole network takes hours, once for all blocks of a shape, and the hooks with which DeepSpeed gathers sharded weights
stay outside of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpcm_scale.model.context import WindowFusion
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.layers import ResidualBlock

_MOST_SHAPES = 256
"""Of one region: widths × resolutions × with and without gradients."""


def compile_regions(model: HPCM) -> None:
    """Have the regions of a model compiled when they are first called, in place.

    For every shape that is trained on there is one compilation. Without gradients, as in evaluation, it holds for all
    image sizes.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            module.compute = _region(module.compute)
        elif isinstance(module, WindowFusion):
            module.forward = _region(module.forward)


def _region(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    def region(*inputs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            for x in inputs:
                torch._dynamo.maybe_mark_dynamic(x, (2, 3))
        return compiled(*inputs)

    return region
