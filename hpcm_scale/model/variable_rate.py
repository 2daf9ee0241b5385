"""Variable rate: one model for a range of λ, after gain units (arXiv 2003.02012) and arXiv 2407.17060.

The residual of y is multiplied by a gain per channel before rounding and divided by it afterwards. Gains, and the
channel scales of the context model, are tables with a row per level; rows are interpolated linearly, gains in the
logarithm. Levels are real numbers from 0 to `levels` − 1, uniform in ln λ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hpcm_scale.config.schema import RateConfig
from hpcm_scale.errors import UserError

LARGEST_BYTE = 255
"""A file stores its level in one byte: 0 for the first level, 255 for the last, linear between."""


def lmbda_of(config: RateConfig, level: Tensor) -> Tensor:
    """λ of levels; any shape."""
    step = math.log(config.highest / config.lowest) / (config.levels - 1)
    return config.lowest * torch.exp(step * level)


def level_of(config: RateConfig, lmbda: float) -> float:
    """The level of a λ, clamped to the range of the model."""
    part = math.log(lmbda / config.lowest) / math.log(config.highest / config.lowest)
    return (config.levels - 1) * min(max(part, 0.0), 1.0)


def level_of_byte(config: RateConfig, byte: int) -> float:
    """The level that a byte stands for."""
    return (config.levels - 1) * byte / LARGEST_BYTE


def byte_of(config: RateConfig, level: float) -> int:
    """The byte of the nearest level."""
    return round(LARGEST_BYTE * level / (config.levels - 1))


def check_level(config: RateConfig, byte: int | None) -> None:
    """Raise UserError if variable-rate weights get no level byte, or fixed-rate weights get one."""
    if config.levels == 1 and byte is not None:
        raise UserError(
            "quality-at-fixed-rate",
            "--quality",
            "these weights have one rate, that of the λ they were trained for; omit the quality",
        )
    if config.levels > 1 and byte is None:
        raise UserError("no-quality", "--quality", "these weights have variable rate; give a quality")


def mix_of(level: Tensor, levels: int) -> Tensor:
    """Linear interpolation weights (B, levels) of the rows of a table, for levels (B,)."""
    rows = torch.arange(levels, device=level.device, dtype=level.dtype)
    return (1 - (level[:, None] - rows).abs()).clamp(min=0)


def mixed(table: Tensor, mix: Tensor) -> Tensor:
    """Rows of a table (levels, C, 1, 1) interpolated by `mix` (B, levels): (B, C, 1, 1)."""
    return (mix[:, :, None, None, None] * table).sum(dim=1)  # no matrix product: autocast would reduce it


class Gains(nn.Module):
    """Gain per level and channel of y, learned in the logarithm.

    Initially √(λ / reference): at high rate the optimal quantization step is proportional to 1/√λ.
    """

    def __init__(self, config: RateConfig, channels: int) -> None:
        super().__init__()
        lmbdas = lmbda_of(config, torch.arange(config.levels, dtype=torch.float32))
        start = 0.5 * torch.log(lmbdas / config.reference)
        self.log = nn.Parameter(start[:, None, None, None].repeat(1, channels, 1, 1))

    def forward(self, mix: Tensor) -> Tensor:
        """Gains (B, channels, 1, 1) fp32, for `mix` (B, levels)."""
        return mixed(self.log, mix).exp()


# Users give the level of a file as a quality from 0, the smallest file, to 100, the best image.


def byte_of_quality(quality: float) -> int:
    """The byte nearest to a quality from 0 to 100."""
    return round(LARGEST_BYTE * quality / 100)


def quality_of_byte(byte: int) -> float:
    """The shortest quality that gives this byte: an integer, or a number with one decimal."""
    quality = 100 * byte / LARGEST_BYTE
    return round(quality) if byte_of_quality(round(quality)) == byte else round(quality, 1)


def default_byte(rate: RateConfig) -> int | None:
    """The byte of λ = `rate.reference`; None for a fixed-rate model."""
    return byte_of(rate, level_of(rate, rate.reference)) if rate.levels > 1 else None
