"""The level of a variable-rate model for a rate or a PSNR, found by making files.

Both rise with the level, but for small ripples: bisection finds where a target is crossed, and the levels around that
place are looked at, too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from functools import cache
from typing import NamedTuple

from torch import Tensor

from hpcm_scale.coding.codec import Codec
from hpcm_scale.coding.distortion import peak_signal_to_noise
from hpcm_scale.errors import UserError
from hpcm_scale.model.variable_rate import LARGEST_BYTE

AROUND = 2
"""Levels on each side of the crossing that are tried."""


class Choice(NamedTuple):
    """An image's file, and the level it was made at."""

    data: bytes
    level: int | None
    """None at fixed rate."""
    psnr: float | None = None
    """dB, of 8-bit pixels; None where it was not asked for."""


def at_level(codec: Codec, pixels: Tensor, level: int | None) -> Choice:
    """The file of an image, uint8 (3, H, W), at a level from 0 to 255, at fixed rate None. Raises as `Codec` does."""
    return Choice(codec.compress(pixels, level), level)


def nearest_to_rate(codec: Codec, pixels: Tensor, bpp: float) -> Choice:
    """The file whose bits per pixel, header included, are nearest to `bpp`; of equals that of the lower level.

    Raises UserError, telling the range, if it lies outside of what the image can be coded at.
    """
    encode, area = codec.encoder(pixels), pixels[0].numel()
    file = cache(lambda level: encode(level).data)

    def rate(level: int) -> float:
        return 8 * len(file(level)) / area

    lowest, highest = rate(0), rate(LARGEST_BYTE)
    if not lowest <= bpp <= highest:
        raise UserError(f"{bpp:g} bpp is out of range for this image; choose {_between(lowest, highest)} bpp")
    level = min(_around(rate, bpp), key=lambda level: abs(rate(level) - bpp))
    return Choice(file(level), level)


def smallest_with_psnr(codec: Codec, pixels: Tensor, psnr: float) -> Choice:
    """The smallest file that decodes to at least this PSNR in dB; of equals the one that decodes best.

    Raises UserError, telling the range, if no level reaches it.
    """
    encode = codec.encoder(pixels)

    @cache
    def choice(level: int) -> Choice:
        data, y_hat, _ = encode(level)
        return Choice(data, level, peak_signal_to_noise(pixels, codec.picture(y_hat, *pixels.shape[1:])))

    def quality(level: int) -> float:
        return choice(level).psnr

    highest = quality(LARGEST_BYTE)
    if highest < psnr:
        raise UserError(f"{psnr:g} dB is out of reach for this image; choose {_between(quality(0), highest)} dB")
    enough = [choice(level) for level in _around(quality, psnr) if quality(level) >= psnr]
    return min(enough, key=lambda choice: (len(choice.data), -choice.psnr))


def _around(value: Callable[[int], float], target: float) -> range:
    """The first level whose value is the target or more, and its neighbours."""
    first = bisect_left(range(LARGEST_BYTE), target, key=value)
    return range(max(first - AROUND, 0), min(first + AROUND, LARGEST_BYTE) + 1)


def _between(low: float, high: float) -> str:
    """In words, with four digits, rounded so that both ends can be had."""
    low, high = (
        Context(prec=4, rounding=rounding).create_decimal_from_float(value)
        for value, rounding in ((low, ROUND_CEILING), (high, ROUND_FLOOR))
    )
    return f"between {low:f} and {high:f}"
