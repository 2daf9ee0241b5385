"""How users name the level of a file: a quality from 0, the smallest file, to 100, the best picture."""

from __future__ import annotations

from hpcm_scale.config.schema import RateConfig
from hpcm_scale.model.variable_rate import LARGEST_BYTE, byte_of, level_of


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
