"""Valid ranges of numeric configuration keys and command-line options."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any

from hpcm_scale.errors import UserError

_LONGEST = 60
"""Characters of a value that are repeated in a message."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """An interval of finite numbers; NaN and infinities are outside."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.least <= number <= self.most and self.above < number < self.below

    def __str__(self) -> str:
        low = f"at least {_text(self.least)}" if self.least > -math.inf else f"greater than {_text(self.above)}"
        high = f"at most {_text(self.most)}" if self.most < math.inf else f"less than {_text(self.below)}"
        return f"{low} and {high}"

    def check(self, key: str, value: Any) -> None:
        """Raise UserError unless the value of `key`, a number or a list or dictionary of numbers, lies in the range.

        None, an unset optional number, is valid.
        """
        several = isinstance(value, Mapping | Sequence)
        for number in (value.values() if isinstance(value, Mapping) else value) if several else [value]:
            if number is not None and number not in self:
                raise UserError(
                    "out-of-range", key, f"{key}={abbreviated(value)} must be {self}{', each' if several else ''}"
                )

    def whole(self, text: str) -> int:
        """Parse an integer option; a `type` of argparse."""
        return self._parsed(int, text, "a whole number")

    def real(self, text: str) -> float:
        """Parse a real-valued option; a `type` of argparse."""
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
"""Processes started on one node."""
LAMBDA = Range(least=1e-9, most=1e6)
UTILISATION = Range(least=0.001, most=1)
"""Fraction of a device's peak FLOP/s (MFU)."""
QUALITY = Range(least=0, most=100)
"""Quality of variable-rate weights."""
PART = Range(above=0, below=1)
"""A proper fraction."""
CROP = Range(least=128, most=16_384)
"""Side of a crop, pixels."""
BUDGET = Range(least=1e-9, most=1e30)
"""Compute, PFLOPs."""
CONFIDENCE = Range(least=0.01, most=0.9999)
"""Confidence level of an interval."""


def number(default: Any, allowed: Range) -> Any:
    """A dataclass field for a number or None, or for a list or dictionary of numbers, each within `allowed`."""
    metadata = {"allowed": allowed}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def entries(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Field]]:
    """Key, value and field of every entry of a dataclass, and of those in it; `prefix`, such as `model.`, is theirs."""
    for entry in fields(config):
        key, value = f"{prefix}{entry.name}", getattr(config, entry.name)
        yield key, value, entry
        if is_dataclass(value):
            yield from entries(value, f"{key}.")


def check_numbers(config: Any, prefix: str = "") -> None:
    """Raise UserError for the first `number` of `entries` that is out of range."""
    for key, value, entry in entries(config, prefix):
        if "allowed" in entry.metadata:
            entry.metadata["allowed"].check(key, value)


def abbreviated(value: object) -> str:
    """A value as text for a message, at most 60 characters and an ellipsis."""
    try:
        text = str(value)
    except ValueError:  # an integer of more than 4,300 digits
        return "…"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _text(end: float) -> str:
    return f"{end:,}" if isinstance(end, int) else f"{end:,.10g}"
