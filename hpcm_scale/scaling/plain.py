"""Dataclasses to plain values for JSON and back, by their type hints."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

to_plain = asdict
"""Dataclasses become dictionaries, tuples stay and become lists in JSON; the order of fields and keys is kept."""


def from_plain(kind: type[T], value: Any) -> T:
    """The value of type `kind` that was made plain and went through JSON.

    Knows dataclasses, tuples, dictionaries, optional values and JSON's own types. Raises TypeError for a value of
    another type, and KeyError for a missing field. A number that is null was not finite, and becomes NaN.
    """
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, Mapping):
            raise TypeError(f"{kind.__name__} is a dictionary, not {value!r}")
        return kind(**{field.name: from_plain(hints[field.name], value[field.name]) for field in fields(kind)})
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return from_plain(next(each for each in inner if each is not type(None)), value)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(from_plain(each, item) for each, item in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):
        return {key: from_plain(inner[1], item) for key, item in value.items()}
    if kind is float and value is None:
        return math.nan
    if origin is None and (isinstance(value, kind) or (kind is float and type(value) is int)):
        return kind(value)
    raise TypeError(f"{value!r} is no {kind}")
