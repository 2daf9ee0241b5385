"""Families of transforms: the residual blocks of g_a, g_s, h_a and h_s.

A family is one file in this folder with a `FAMILY`. All families share the convolutions between resolutions and the
entropy model. docs/families.md lists the requirements.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hpcm_scale.config.schema import ModelConfig
from hpcm_scale.errors import UserError
from hpcm_scale.limits import check_numbers
from hpcm_scale.model.layers import Block

BlockFactory = Callable[[ModelConfig, Any, int, int, int], Block]
"""(config, options, channels, stage, index) to a residual block, (B, channels, H, W) to the same shape.

`options` are those of the family; the resolution is 1/2^stage of the image, stage 1 to 5; `index` counts the blocks of
a stage from 0. Raises UserError for invalid options.
"""


@dataclass
class NoOptions:
    """Options of a family without any."""


@dataclass(frozen=True)
class Family:
    """A family of transforms."""

    block: BlockFactory
    """Of g_a and g_s, at stages 1 to 4."""
    hyper_block: BlockFactory
    """Of h_a and h_s, at stages 4 and 5."""
    options: type = NoOptions
    """Dataclass of its own options; every field has a default, numbers a range (`limits.number`)."""
    base: ModelConfig = field(default_factory=ModelConfig)
    """Configuration whose widths and depths other sizes are derived from (`model.ladder`)."""
    multiple: int = 8
    """Channels of the transforms are multiples of it from 64 on."""


def names() -> list[str]:
    """Names of all families."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


@cache
def family(name: str) -> Family:
    """The family called `name`. Raises UserError if there is none."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names())}"
        raise UserError("unknown-family", "model.family", f"there is no model.family={name}; {hint}")
    return import_module(f"{__name__}.{name}").FAMILY


def options_of(config: ModelConfig) -> Any:
    """The options of a family, with defaults. Raises UserError for one that is unknown, or of a wrong type or value."""
    kind = family(config.family).options
    known = [field.name for field in fields(kind)]
    for key, value in config.options.items():
        if key not in known:
            remedy = f"its options are {', '.join(known)}" if known else "omit model.options"
            raise UserError(
                "unknown-option",
                f"model.options.{key}",
                f"model.options.{key} is not an option of model.family={config.family}; {remedy}",
            )
        try:
            OmegaConf.merge(OmegaConf.structured(kind), {key: value})
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                "option-type", f"model.options.{key}", f"model.options.{key}={value} has the wrong type; {reason}"
            ) from error
    options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), config.options))
    check_numbers(options, "model.options.")
    return options


def blocks(config: ModelConfig, channels: int, stage: int, count: int, *, hyper: bool = False) -> list[Block]:
    """The residual blocks of a stage, (B, channels, H, W) to the same shape. Raises UserError for invalid options."""
    chosen, options = family(config.family), options_of(config)
    kind = chosen.hyper_block if hyper else chosen.block
    return [kind(config, options, channels, stage, index) for index in range(count)]


def check(config: ModelConfig) -> None:
    """Raise UserError for an unknown family or invalid options, before a model is built."""
    y, middle = config.latent_channels, config.hyper_channels
    with torch.device("meta"):
        for stage, channels in enumerate([*config.channels, y], start=1):
            blocks(config, channels, stage, 1)
        for stage, channels in ((4, y), (4, 2 * y), (5, middle)):
            blocks(config, channels, stage, 1, hyper=True)
