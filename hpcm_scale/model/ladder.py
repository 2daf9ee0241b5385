"""Sizes at will: `model=hpcm model.size=30m`, from 0.1 million to 10 billion parameters, by one rule for all families.

The rule. The base of a family (`Family.base`; 68m for hpcm) gives the proportions. Up to the base's own number of
parameters a size has its depths, and its widths times one factor: over sizes of one depth learning rates transfer.
Above, depths grow as the square root of the number, and widths as what that leaves, about its fourth root; these are
the shares of EfficientNet (arXiv 1905.11946: 1.2 times the depth with 1.1 times the width, exponents of 0.49 and 0.26).

M can only be a multiple of 8, and two thirds of all parameters go with its square. It is the multiple next to what the
factor makes of it, or the one below where that would leave the other widths less than nine tenths of their proportion;
they make up for the difference: a few percent, but up to twice their proportion in the smallest sizes.
From 64 on they are multiples of 8, or of what suits the family's blocks, and the wider the rounder. The heads of the
cross-attention have about 20 channels, as in 68m.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from hpcm_scale.config.checks import check_model
from hpcm_scale.config.schema import ModelConfig, PriorConfig
from hpcm_scale.errors import UserError

SMALLEST, LARGEST = 100_000, 10_000_000_000
WITHIN = 0.02
"""Largest relative difference between the size asked for and its exact number of parameters; half of it is aimed at."""
_UNITS = {"b": 10**9, "m": 10**6, "k": 10**3}
_DEPTHS = ("g_a_blocks", "g_s_blocks", "hyper_blocks", "adaptor_blocks", "prior_s1_s2", "prior_s3")
_WIDTHS = ("channels", "latent_channels", "hyper_latent_channels", "hyper_channels")
_RULED = (*_DEPTHS, *_WIDTHS, "attention_heads")
_GROUPS = 8
"""M is a multiple of it: the coding order's channel groups."""
_LEAST = 0.9
"""The other widths keep so much of their proportion to M."""
_HEAD = 20
"""Channels of an attention head, about."""
_LOOKS = 5
"""Sizes that are tried, each with its exact number of parameters, before another kind of width is tuned."""


def parameters_of(size: str) -> int:
    """The number that 300k, 0.3m, 30M, 1.5b or 30000000 stands for. Raises UserError for others, or out of range."""
    text = size.strip().lower()
    unit = _UNITS.get(text[-1:], 1)
    try:
        number = unit * float(text if unit == 1 else text[:-1])
    except ValueError as error:
        raise UserError(f"model.size={size} is no number of parameters; write 300k, 30m, 1.5b or 30000000") from error
    if not SMALLEST <= number <= LARGEST:
        raise UserError(f"model.size={size} must lie between {size_name(SMALLEST)} and {size_name(LARGEST)} parameters")
    return round(number)


def size_name(parameters: int) -> str:
    """The number as people write it: 300k, 30m, 1.5b."""
    letter, unit = next(entry for entry in _UNITS.items() if parameters >= entry[1])
    return f"{parameters / unit:.10g}{letter}"


def sized(config: ModelConfig) -> ModelConfig:
    """The model of `config.size` parameters, within 2 %, by the rule above; `config` itself where it names no size.

    Widths, depths and `attention_heads` are the rule's, all other keys stay. It is called after family and size, such
    as hpcm_30m, and has no `size` any more. Raises UserError for a size that there is not, or
    beside one of the keys that follow from it.
    """
    if config.size is None:
        return config
    parameters = parameters_of(config.size)
    default = ModelConfig()
    for key in _RULED:
        if getattr(config, key) != getattr(default, key):
            raise UserError(f"model.{key} follows from model.size={config.size}; leave one of the two out")
    found = _fitted(replace(config, name=f"{config.family}_{size_name(parameters)}", size=None), parameters)
    if abs(found.off) > WITHIN:
        raise UserError(
            f"model.size={config.size} cannot be met within {WITHIN:.0%} with model.options and the other keys as they "
            f"are, only {found.off:+.1%} off; leave those out, or choose another size"
        )
    return found.model


class _Found(NamedTuple):
    """A model near the size asked for."""

    off: float
    """Its relative difference from that."""
    factor: float
    """Of the widths that were tuned, to the base's."""
    model: ModelConfig


def _fitted(config: ModelConfig, parameters: int) -> _Found:
    from hpcm_scale.model.families import family  # here and below: torch takes seconds to import

    chosen = family(config.family)
    base = replace(config, **{key: getattr(chosen.base, key) for key in _RULED})
    check_model(base)  # what the user says besides
    widened = partial(_widened, multiple=chosen.multiple)
    whole, half = _context_and_rest(widened(base, 1, 1)), _context_and_rest(widened(base, 0.5, 0.5))
    deep = _deepened(base, max(1.0, math.sqrt(parameters / sum(whole))))
    # Matrices grow with the square of a width, biases and depthwise kernels with the width itself.
    linear = [4 * of_half - of_whole for of_half, of_whole in zip(half, whole, strict=True)]
    square = [n - of_linear for n, of_linear in zip(_context_and_rest(widened(deep, 1, 1)), linear, strict=True)]
    due = _root(sum(square), sum(linear), parameters)

    def rest(latent: float) -> float:
        """Factor of the other widths, for what the context model leaves."""
        return _root(square[1], linear[1], max(1.0, parameters - square[0] * latent**2 - linear[0] * latent))

    latent = _latent_channels(base, due) / base.latent_channels
    if rest(latent) < _LEAST * latent:
        latent = max(_GROUPS / base.latent_channels, latent - _GROUPS / base.latent_channels)
    factor = rest(latent)
    found = _tuned(lambda rest: widened(deep, latent, rest), factor, ("g_a", "g_s", "hyper"), parameters)
    if abs(found.off) <= WITHIN / 2:
        return found
    finer = _tuned(lambda hyper: widened(deep, latent, found.factor, hyper), found.factor, ("hyper",), parameters)
    return min(found, finer, key=lambda found: abs(found.off))


def _tuned(build: Callable[[float], ModelConfig], factor: float, parts: tuple[str, ...], parameters: int) -> _Found:
    """The best of a few factors from the given one on; the `parts` of the network grow with its square."""
    below, above = 0.0, math.inf
    looked: list[_Found] = []
    while len(looked) < _LOOKS:
        model = build(factor)
        counts = _counts(model)
        missing = parameters - sum(counts.values())
        looked.append(_Found(-missing / parameters, factor, model))
        if abs(missing) <= WITHIN / 2 * parameters:
            break
        below, above = (factor, above) if missing > 0 else (below, factor)
        growing = sum(counts[part] for part in parts)
        factor *= math.sqrt(max(growing + missing, growing / 4) / growing)
        if not below < factor < above or build(factor) == model:
            low, high = below or above / 1.2, above if above < math.inf else below * 1.2
            factor = math.sqrt(low * high)
    return min(looked, key=lambda found: abs(found.off))


def _root(square: float, linear: float, value: float) -> float:
    """The positive x of square·x² + linear·x = value."""
    return (math.sqrt(linear**2 + 4 * square * value) - linear) / (2 * square)


def _deepened(base: ModelConfig, factor: float) -> ModelConfig:
    def times(blocks: list[int]) -> list[int]:
        return [round(factor * count) for count in blocks]

    def deeper(depth: list[int] | PriorConfig) -> list[int] | PriorConfig:
        return times(depth) if isinstance(depth, list) else PriorConfig(*times([*vars(depth).values()]))

    return replace(base, **{key: deeper(getattr(base, key)) for key in _DEPTHS})


def _widened(
    base: ModelConfig, latent: float, transforms: float, hyper: float | None = None, *, multiple: int
) -> ModelConfig:
    """With factors of M, of the transforms' widths and, unless it is the same, of the hyper transforms' widths."""
    hyper = transforms if hyper is None else hyper
    latent_channels = _rounded(latent * base.latent_channels, _GROUPS)
    return replace(
        base,
        channels=[_width(transforms * channels, base.partial_ratio, multiple) for channels in base.channels],
        latent_channels=latent_channels,
        hyper_latent_channels=_width(hyper * base.hyper_latent_channels, base.partial_ratio),
        hyper_channels=_width(hyper * base.hyper_channels, base.partial_ratio),
        attention_heads=_heads(2 * latent_channels),
    )


def _latent_channels(base: ModelConfig, factor: float) -> int:
    """A multiple of 8, of 16 from 512 on, of 32 from 1024 on, and so forth."""
    channels = factor * base.latent_channels
    return _rounded(channels, max(_GROUPS, _power_of_two(channels / 32)))


def _width(channels: float, least: int, multiple: int = 8) -> int:
    """Rounded to a multiple of 2, of `multiple` from 64 on, of 16 from 256 on, of 32 from 512 on, and so forth."""
    return _rounded(max(channels, least), max(multiple if channels >= 64 else 2, _power_of_two(channels / 16)))


def _power_of_two(value: float) -> int:
    """The largest up to `value`, at least 1."""
    return 2 ** max(0, math.floor(math.log2(value)))


def _rounded(value: float, step: int) -> int:
    return max(1, math.floor(value / step + 0.5)) * step


def _heads(channels: int) -> int:
    """The number of heads, each of `channels` / heads, that is nearest to 20 by ratio."""
    divisors = [heads for heads in range(1, channels + 1) if channels % heads == 0]
    return min(divisors, key=lambda heads: abs(math.log(channels / heads / _HEAD)))


def _context_and_rest(model: ModelConfig) -> tuple[int, int]:
    counts = _counts(model)
    return counts["context"], sum(counts.values()) - counts["context"]


def _counts(model: ModelConfig) -> dict[str, int]:
    """Exact parameters by part; a base is counted once."""
    from hpcm_scale.model.parameters import on_meta, parameters_by_part

    described = repr(replace(model, name=""))
    if described not in _COUNTED:
        _COUNTED[described] = parameters_by_part(on_meta(model))
    return _COUNTED[described]


_COUNTED: dict[str, dict[str, int]] = {}
