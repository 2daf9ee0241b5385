"""The numbers that users may give: every numeric key of a configuration and every numeric option has a `Range`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from hpcm_scale.errors import UserError

_LONGEST = 60
"""Characters of a value that a message repeats."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers between two finite ends; neither nan nor infinities are among them."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        low = f"at least {_told(self.least)}" if self.least > -math.inf else f"greater than {_told(self.above)}"
        high = f"at most {_told(self.most)}" if self.most < math.inf else f"less than {_told(self.below)}"
        return f"{low} and {high}"

    def check(self, key: str, value: Any) -> None:
        """Raise UserError unless the value of `key`, a number or a list or dictionary of them, lies in this range.

        None, an optional number that is not set, is allowed.
        """
        several = isinstance(value, Mapping | Sequence)
        for number in (value.values() if isinstance(value, Mapping) else value) if several else [value]:
            if number is not None and number not in self:
                raise UserError(f"{key}={abbreviated(value)} must be {self}{', each' if several else ''}")

    def whole(self, text: str) -> int:
        """The whole number of a command-line option: argparse's `type`."""
        return self._parsed(int, text, "a whole number")

    def real(self, text: str) -> float:
        """The real number of a command-line option: argparse's `type`."""
        return self._parsed(float, text, "a number")

    def _parsed(self, kind: Callable[[str], Any], text: str, name: str) -> Any:
        try:
            number = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{abbreviated(text)} is not {name}; it must be {self}") from None
        if number not in self:
            raise argparse.ArgumentTypeError(f"{abbreviated(text)} must be {self}")
        return number


COUNT = Range(least=1, most=10**12)
COUNT_OR_NONE = Range(least=0, most=10**12)
PROCESSES = Range(least=1, most=1024)
"""Started on one machine."""
LAMBDA = Range(least=1e-9, most=1e6)
UTILISATION = Range(least=0.001, most=1)
"""Share of a device's peak rate that is in use."""
QUALITY = Range(least=0, most=100)
"""Of variable-rate weights."""
PART = Range(above=0, below=1)
"""Neither nothing nor all."""
CROP = Range(least=128, most=16_384)
"""Side, pixels."""
BUDGET = Range(least=1e-9, most=1e30)
"""Of compute, PFLOPs."""
CONFIDENCE = Range(least=0.01, most=0.9999)
"""Level of an interval."""


def number(default: Any, allowed: Range) -> Any:
    """A dataclass field that holds a number or None, or a list or dictionary of numbers, each within `allowed`."""
    metadata = {"allowed": allowed}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_numbers(config: Any, prefix: str = "") -> None:
    """Check every `number` of a dataclass, and of the dataclasses in it.

    `prefix` is what their keys begin with, for example `model.`. Raises UserError for the first one out of its range.
    """
    for entry in fields(config):
        key, value = f"{prefix}{entry.name}", getattr(config, entry.name)
        if is_dataclass(value):
            check_numbers(value, f"{key}.")
        elif "allowed" in entry.metadata:
            entry.metadata["allowed"].check(key, value)


def abbreviated(value: object) -> str:
    """A value as an error message repeats it: in one line, cut where it is long."""
    try:
        text = str(value)
    except ValueError:  # Python writes no integers of more than 4,300 digits
        return "…"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _told(end: float) -> str:
    return f"{end:,}" if isinstance(end, int) else f"{end:,.10g}"
