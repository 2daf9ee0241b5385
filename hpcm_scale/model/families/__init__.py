"""Families of transforms: what g_a, g_s, h_a and h_s are made of.

A family is one file in this folder that holds `FAMILY`; convolutions between resolutions and the entropy model are
common to all. docs/families.md says what a family must honour.
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

BlockOf = Callable[[ModelConfig, Any, int, int, int], Block]
"""(config, options, channels, stage, index) to a residual block, (B, channels, H, W) to the same shape.

`options` are the family's own settings; the block's grid is 1/2^stage of the image, stage 1 to 5; `index` counts the
blocks of a stage from 0. Raises UserError for settings of which there is no such block.
"""


@dataclass
class NoOptions:
    """Of a family that has no settings of its own."""


@dataclass(frozen=True)
class Family:
    """What a family's file says."""

    block: BlockOf
    """Of g_a and g_s, at stages 1 to 4."""
    hyper_block: BlockOf
    """Of h_a and h_s, at stages 4 and 5."""
    options: type = NoOptions
    """Dataclass of its own settings: every field has a default, numbers a range (`limits.number`)."""
    base: ModelConfig = field(default_factory=ModelConfig)
    """Whose widths and depths other sizes follow from (`model.ladder`)."""
    multiple: int = 8
    """Channels of the transforms are multiples of it where they are many."""


def names() -> list[str]:
    """All families."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


@cache
def family(name: str) -> Family:
    """The family of that name; raises UserError if there is none."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names())}."
        raise UserError(f"model.family={name} is none of the families of transforms; {hint}")
    return import_module(f"{__name__}.{name}").FAMILY


def options_of(config: ModelConfig) -> Any:
    """The family's own settings, defaults filled in; raises UserError for one that it has not, or out of its range."""
    kind = family(config.family).options
    known = [field.name for field in fields(kind)]
    for key, value in config.options.items():
        if key not in known:
            mend = f"it has {', '.join(known)}" if known else "leave model.options out"
            raise UserError(f"model.options.{key} is no setting of model.family={config.family}; {mend}")
        try:
            OmegaConf.merge(OmegaConf.structured(kind), {key: value})
        except OmegaConfBaseException as error:
            raise UserError(
                f"model.options.{key}={value} is of the wrong type; {str(error).splitlines()[0]}"
            ) from error
    options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), config.options))
    check_numbers(options, "model.options.")
    return options


def blocks(config: ModelConfig, channels: int, stage: int, count: int, *, hyper: bool = False) -> list[Block]:
    """The residual blocks of a stage, (B, channels, H, W) to the same shape; raises UserError as `BlockOf` says."""
    chosen, options = family(config.family), options_of(config)
    kind = chosen.hyper_block if hyper else chosen.block
    return [kind(config, options, channels, stage, index) for index in range(count)]


def check(config: ModelConfig) -> None:
    """Raise UserError, naming the key and the mend, for a family or settings of one that cannot be built."""
    y, middle = config.latent_channels, config.hyper_channels
    with torch.device("meta"):
        for stage, channels in enumerate([*config.channels, y], start=1):
            blocks(config, channels, stage, 1)
        for stage, channels in ((4, y), (4, 2 * y), (5, middle)):
            blocks(config, channels, stage, 1, hyper=True)
