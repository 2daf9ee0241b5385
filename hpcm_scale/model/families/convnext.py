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
    """model.options of model.family=convnext."""

    kernel: int = number(7, Range(least=1, most=255))
    """Side of the depthwise convolutions; odd."""


class ConvNeXtBlock(ResidualBlock):
    """x + reduce(GELU(expand(norm(spatial(x))))), `spatial` a depthwise convolution with a large kernel.

    Without ConvNeXt's layer scale, whose 1e-6 would keep a block silent for long: branches start at a fraction of
    the stream by torch's own initial weights.
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
        raise UserError(f"model.options.kernel={options.kernel} must be odd; use 7")
    return ConvNeXtBlock(channels, options.kernel, config.expansion)


FAMILY = Family(block=block, hyper_block=block, options=Options, base=swin.FAMILY.base)  # so that the two compare
