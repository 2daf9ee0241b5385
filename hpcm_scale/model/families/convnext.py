"""ConvNeXt transforms (arXiv 2201.03545; in a codec: ConvNeXt-ChARM, arXiv 2307.06342)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from hpcm_scale.config.schema import ModelConfig
from hpcm_scale.errors import UserError
from hpcm_scale.limits import Range, number
from hpcm_scale.model.families import Family, swin
from hpcm_scale.model.layers import Block, ChannelNorm, ResidualBlock


@dataclass
class Options:
    """`model.options` of `model.family=convnext`."""

    kernel: int = number(7, Range(least=1, most=255))
    """Kernel size of the depthwise convolutions; odd."""


class ConvNeXtBlock(ResidualBlock):
    """x + reduce(GELU(expand(norm(spatial(x))))), `spatial` a depthwise convolution with a large kernel.

    There is no layer scale, which would start at 1e-6: with torch's default initialization a branch already adds only
    a fraction of the stream's variance.
    """

    def __init__(self, channels: int, kernel: int, expansion: int) -> None:
        depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        super().__init__(depthwise, channels, expansion)
        self.norm = ChannelNorm(channels)

    def compute(self, x: Tensor) -> Tensor:
        return self.reduce(F.gelu(self.expand(self.norm(self.spatial(x)))), onto=x)


def block(config: ModelConfig, options: Options, channels: int, stage: int, index: int) -> Block:
    """ConvNeXt's block, the same at every stage."""
    if options.kernel % 2 == 0:
        raise UserError(
            "even-kernel", "model.options.kernel", f"model.options.kernel={options.kernel} must be odd; use 7"
        )
    return ConvNeXtBlock(channels, options.kernel, config.expansion)


FAMILY = Family(block=block, hyper_block=block, options=Options, base=swin.FAMILY.base)  # for comparison
