"""The size ladder: `model=hpcm model.size=30m`, from 0.1 million to 10 billion parameters, one rule for all families.

The base of a family (`Family.base`; 68m for hpcm) sets the proportions. Up to the number of parameters of the base, a
size has the depths of the base, and its widths times one factor: learning rates transfer between sizes of one depth.
Above, depths grow as the square root of the number of parameters and widths as about its fourth root, the compound
scaling of EfficientNet (arXiv 1905.11946: exponents 0.49 and 0.26).

M is a multiple of 8, and two thirds of all parameters are proportional to its square. It is rounded to the nearest
multiple, or to the one below if the other widths would otherwise be less than 0.9 of their proportion. The other widths
compensate for the rounding: by a few percent, up to a factor of two in the smallest sizes. From 64 on they are
multiples of 8 or of `Family.multiple`, and of larger powers of two as they grow. Heads of the cross-attention have
about 20 channels, as in 68m.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

from omegaconf import DictConfig, OmegaConf

from hpcm_scale.config.checks import check_model
from hpcm_scale.config.compose import composed, config_folder, translated, typed
from hpcm_scale.config.schema import Config, ModelConfig, PriorConfig
from hpcm_scale.errors import UserError

SMALLEST, LARGEST = 100_000, 10_000_000_000
WITHIN = 0.02
"""Largest relative difference between the requested and the exact number of parameters; the search stops at half."""
_UNITS = {"b": 10**9, "m": 10**6, "k": 10**3}
_DEPTHS = ("g_a_blocks", "g_s_blocks", "hyper_blocks", "adaptor_blocks", "prior_s1_s2", "prior_s3")
_WIDTHS = ("channels", "latent_channels", "hyper_latent_channels", "hyper_channels")
_RULED = (*_DEPTHS, *_WIDTHS, "attention_heads")
_GROUPS = 8
"""M is a multiple of it: channel groups of the coding order."""
_LEAST = 0.9
"""Least proportion of the other widths to M, relative to the base."""
_HEAD = 20
"""Approximate channels of an attention head."""
_TRIALS = 5
"""Factors that `_tuned` tries, each with its exact number of parameters."""


def parameters_of(size: str) -> int:
    """Parse a number of parameters: 300k, 0.3m, 30M, 1.5b or 30000000. Raises UserError if it is invalid."""
    text = size.strip().lower()
    unit = _UNITS.get(text[-1:], 1)
    try:
        number = unit * float(text if unit == 1 else text[:-1])
    except ValueError as error:
        raise UserError(
            "malformed-size",
            "model.size",
            f"model.size={size} is not a number of parameters; write 300k, 30m, 1.5b or 30000000",
        ) from error
    if not SMALLEST <= number <= LARGEST:
        raise UserError(
            "size-out-of-range",
            "model.size",
            f"model.size={size} must lie between {size_name(SMALLEST)} and {size_name(LARGEST)} parameters",
        )
    return round(number)


def size_name(parameters: int) -> str:
    """Format a number of parameters: 300k, 30m, 1.5b."""
    letter, unit = next(entry for entry in _UNITS.items() if parameters >= entry[1])
    return f"{parameters / unit:.10g}{letter}"


def sized(config: ModelConfig) -> ModelConfig:
    """The configuration of `config.size` parameters within 2 %; `config` itself if it has no size.

    The rule sets widths, depths and `attention_heads`; other keys are kept. The result is named after family and size,
    such as hpcm_30m, and has no `size`. Raises UserError for a size that is invalid or cannot be reached, or if a key
    that the rule sets is set as well.
    """
    if config.size is None:
        return config
    parameters = parameters_of(config.size)
    default = ModelConfig()
    for key in _RULED:
        if getattr(config, key) != getattr(default, key):
            raise UserError(
                "size-and-shape",
                f"model.{key}",
                f"model.{key} follows from model.size={config.size}; omit one of the two",
            )
    found = _fitted(replace(config, name=f"{config.family}_{size_name(parameters)}", size=None), parameters)
    if abs(found.off) > WITHIN:
        raise UserError(
            "unreachable-size",
            "model.size",
            f"model.size={config.size} cannot be reached within {WITHIN:.0%} with these model.options and other keys; "
            f"the nearest is {found.off:+.1%} off; omit them, or choose another size",
        )
    return found.model


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters of a configuration, with or without `size`; counted once each."""
    return sum(_counts(sized(config)).values())


def compose_sized(overrides: Sequence[str]) -> Config:
    """The configuration of one run, from Hydra overrides, with model.size resolved; see `config.compose.compose`."""
    return typed(with_size(composed(overrides)))


def with_size(config: DictConfig) -> DictConfig:
    """Hydra's configuration with model.size resolved to widths and depths.

    Keys that refer to them, such as a learning rate that follows from a width, are resolved later. Raises UserError
    for a size of a preset that has widths of its own.
    """
    name, family, size = (config.model[key] for key in ("name", "family", "size"))
    if size is None:
        return config
    preset = config_folder() / "model" / f"{name}.yaml"
    if preset.is_file() and "size" not in OmegaConf.load(preset):
        raise UserError(
            "size-of-preset",
            "model.size",
            f"model={name} has widths and depths of its own, and model.size={size} would replace them; use "
            f"model={family} model.size={size}, or omit model.size",
        )
    config.model = sized(translated(lambda: cast("ModelConfig", OmegaConf.to_object(config.model))))
    return config


class _Found(NamedTuple):
    """A configuration near the requested size."""

    off: float
    """Relative difference of its parameters from the request."""
    factor: float
    """Of the tuned widths to those of the base."""
    model: ModelConfig


def _fitted(config: ModelConfig, parameters: int) -> _Found:
    from hpcm_scale.model.families import family  # here and below: torch is slow to import

    chosen = family(config.family)
    base = replace(config, **{key: getattr(chosen.base, key) for key in _RULED})
    check_model(base)
    widened = partial(_widened, multiple=chosen.multiple)
    whole, half = _context_and_rest(widened(base, 1, 1)), _context_and_rest(widened(base, 0.5, 0.5))
    deep = _deepened(base, max(1.0, math.sqrt(parameters / sum(whole))))
    # Matrices grow with the square of a width, biases and depthwise kernels with the width itself.
    linear = [4 * of_half - of_whole for of_half, of_whole in zip(half, whole, strict=True)]
    square = [n - of_linear for n, of_linear in zip(_context_and_rest(widened(deep, 1, 1)), linear, strict=True)]
    factor = _root(sum(square), sum(linear), parameters)

    def rest(latent: float) -> float:
        """Factor of the other widths, whose parameters the context model leaves."""
        return _root(square[1], linear[1], max(1.0, parameters - square[0] * latent**2 - linear[0] * latent))

    latent = _latent_channels(base, factor) / base.latent_channels
    if rest(latent) < _LEAST * latent:
        latent = max(_GROUPS / base.latent_channels, latent - _GROUPS / base.latent_channels)
    factor = rest(latent)
    found = _tuned(lambda rest: widened(deep, latent, rest), factor, ("g_a", "g_s", "hyper"), parameters)
    if abs(found.off) <= WITHIN / 2:
        return found
    finer = _tuned(lambda hyper: widened(deep, latent, found.factor, hyper), found.factor, ("hyper",), parameters)
    return min(found, finer, key=lambda found: abs(found.off))


def _tuned(build: Callable[[float], ModelConfig], factor: float, parts: tuple[str, ...], parameters: int) -> _Found:
    """The best of a few factors, starting with `factor`; parameters of the `parts` grow with its square."""
    below, above = 0.0, math.inf
    trials: list[_Found] = []
    while len(trials) < _TRIALS:
        model = build(factor)
        counts = _counts(model)
        missing = parameters - sum(counts.values())
        trials.append(_Found(-missing / parameters, factor, model))
        if abs(missing) <= WITHIN / 2 * parameters:
            break
        below, above = (factor, above) if missing > 0 else (below, factor)
        growing = sum(counts[part] for part in parts)
        factor *= math.sqrt(max(growing + missing, growing / 4) / growing)
        if not below < factor < above or build(factor) == model:
            low, high = below or above / 1.2, above if above < math.inf else below * 1.2
            factor = math.sqrt(low * high)
    return min(trials, key=lambda found: abs(found.off))


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
    """`base` with factors of M, of the widths of the transforms and of the hyper transforms (default: the same)."""
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
    """M rounded to a multiple of 8, of 16 from 512 on, of 32 from 1024 on, and so forth."""
    channels = factor * base.latent_channels
    return _rounded(channels, max(_GROUPS, _power_of_two(channels / 32)))


def _width(channels: float, least: int, multiple: int = 8) -> int:
    """Rounded to a multiple of 2, of `multiple` from 64 on, of 16 from 256 on, of 32 from 512 on, and so forth."""
    return _rounded(max(channels, least), max(multiple if channels >= 64 else 2, _power_of_two(channels / 16)))


def _power_of_two(value: float) -> int:
    """The largest power of two up to `value`, at least 1."""
    return 2 ** max(0, math.floor(math.log2(value)))


def _rounded(value: float, step: int) -> int:
    return max(1, math.floor(value / step + 0.5)) * step


def _heads(channels: int) -> int:
    """The number of heads whose width is nearest to 20 by ratio."""
    divisors = [heads for heads in range(1, channels + 1) if channels % heads == 0]
    return min(divisors, key=lambda heads: abs(math.log(channels / heads / _HEAD)))


def _context_and_rest(model: ModelConfig) -> tuple[int, int]:
    counts = _counts(model)
    return counts["context"], sum(counts.values()) - counts["context"]


def _counts(model: ModelConfig) -> dict[str, int]:
    """Exact parameters by part, cached."""
    from hpcm_scale.model.parameters import on_meta, parameters_by_part

    key = repr(replace(model, name=""))
    if key not in _COUNTED:
        _COUNTED[key] = parameters_by_part(on_meta(model))
    return _COUNTED[key]


_COUNTED: dict[str, dict[str, int]] = {}
