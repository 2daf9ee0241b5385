"""Variable rate: one model for a range of λ, after gained codecs (arXiv 2003.02012) and arXiv 2407.17060.

Before rounding, the residual of y is multiplied by a gain per channel, and divided by it after. Gains, and the channel
scales of the context model, are tables with a row per level; a level between two rows mixes them linearly, gains in
their logarithms. Levels are numbers from 0 to `levels` − 1, log-spaced in λ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hpcm_scale.config.schema import RateConfig
from hpcm_scale.errors import UserError

LARGEST_BYTE = 255
"""A file's level is one byte: 0 for level 0, this for the last one, linear between."""


def lmbda_of(config: RateConfig, level: Tensor) -> Tensor:
    """λ of levels, of any shape."""
    step = math.log(config.highest / config.lowest) / (config.levels - 1)
    return config.lowest * torch.exp(step * level)


def level_of(config: RateConfig, lmbda: float) -> float:
    """The level of a λ; beyond the range of the model, the nearest that it has."""
    part = math.log(lmbda / config.lowest) / math.log(config.highest / config.lowest)
    return (config.levels - 1) * min(max(part, 0.0), 1.0)


def level_of_byte(config: RateConfig, byte: int) -> float:
    """The level of a file's byte."""
    return (config.levels - 1) * byte / LARGEST_BYTE


def byte_of(config: RateConfig, level: float) -> int:
    """The byte whose level is nearest."""
    return round(LARGEST_BYTE * level / (config.levels - 1))


def check_level(config: RateConfig, byte: int | None) -> None:
    """Raises UserError unless a file of a model with these levels can have this byte, or, at fixed rate, none."""
    if config.levels == 1 and byte is not None:
        raise UserError("these weights have one rate, that of the λ they were trained for; leave the quality out")
    if config.levels > 1 and byte is None:
        raise UserError("these weights have a range of rates; name a quality")


def mix_of(level: Tensor, levels: int) -> Tensor:
    """Levels (B,) to the weights of a table's rows, (B, levels): two neighbours', or one's."""
    rows = torch.arange(levels, device=level.device, dtype=level.dtype)
    return (1 - (level[:, None] - rows).abs()).clamp(min=0)


def mixed(table: Tensor, mix: Tensor) -> Tensor:
    """Rows of a table (levels, C, 1, 1), mixed by (B, levels): (B, C, 1, 1). No matrix product: those may be bf16."""
    return (mix[:, :, None, None, None] * table).sum(dim=1)


class Gains(nn.Module):
    """Gain per level and channel of y, learned in its logarithm.

    Starts at √(λ / reference): at high rate the best step of a quantizer is inverse to √λ.
    """

    def __init__(self, config: RateConfig, channels: int) -> None:
        super().__init__()
        lmbdas = lmbda_of(config, torch.arange(config.levels, dtype=torch.float32))
        start = 0.5 * torch.log(lmbdas / config.reference)
        self.log = nn.Parameter(start[:, None, None, None].repeat(1, channels, 1, 1))

    def forward(self, mix: Tensor) -> Tensor:
        """(B, levels) to (B, channels, 1, 1), fp32."""
        return mixed(self.log, mix).exp()


# How users name the level of a file: a quality from 0, the smallest file, to 100, the best picture.


def byte_of_quality(quality: float) -> int:
    """The byte of a file's level, 0 to 255, that is nearest to a quality."""
    return round(LARGEST_BYTE * quality / 100)


def quality_of_byte(byte: int) -> float:
    """The shortest number that leads to a file's byte: a whole one, or one with a decimal."""
    quality = 100 * byte / LARGEST_BYTE
    return round(quality) if byte_of_quality(round(quality)) == byte else round(quality, 1)


def usual_byte(rate: RateConfig) -> int | None:
    """The byte where no quality is named: that of the λ at which the model's gains started; None at fixed rate."""
    return byte_of(rate, level_of(rate, rate.reference)) if rate.levels > 1 else None
