"""The transforms of HPCM (arXiv 2507.19125, figure 3): partial 3×3 convolutions."""

from __future__ import annotations

from hpcm_scale.config.schema import ModelConfig
from hpcm_scale.model.families import Family, NoOptions
from hpcm_scale.model.layers import Block, partial_block


def block(config: ModelConfig, options: NoOptions, channels: int, stage: int, index: int) -> Block:
    """PConvRB, the same at every stage."""
    return partial_block(channels, config.partial_ratio, config.expansion)


FAMILY = Family(block=block, hyper_block=block)
