"""The lines of a journal as columns: a million lines in a tenth of the memory of a million dictionaries."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, SupportsIndex

import numpy as np

_CHUNK = 8192


class Records(Sequence[dict[str, float]]):
    """The numbers of journal lines, in the order they were written; an index gives that line's numbers.

    A number that is null (it was not finite) or missing is NaN in its column, and not in its line.
    Anything but numbers is left out. Raises TypeError when a line is no dictionary.
    """

    def __init__(self, lines: Iterable[dict[str, Any]] = ()) -> None:
        self.nulls: Counter[str] = Counter()
        """How many lines hold null for a key."""
        chunks: list[dict[str, np.ndarray]] = []
        sizes: list[int] = []
        lines = iter(lines)
        while chunk := list(islice(lines, _CHUNK)):
            chunks.append(self._columns_of(chunk))
            sizes.append(len(chunk))
        keys = dict.fromkeys(key for chunk in chunks for key in chunk)
        absent = [np.full(size, np.nan) for size in sizes]
        self._length = sum(sizes)
        self._columns = {
            key: np.concatenate([chunk.get(key, none) for chunk, none in zip(chunks, absent, strict=True)])
            for key in keys
        }

    def _columns_of(self, lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        if not all(isinstance(line, dict) for line in lines):
            raise TypeError("a line is no JSON object")
        columns = {}
        for key in dict.fromkeys(chain.from_iterable(lines)):
            try:
                values = np.array([line.get(key, np.nan) for line in lines], dtype=np.float64)  # null becomes NaN
            except (TypeError, ValueError):  # texts, lists
                values = np.array([_number(line.get(key)) for line in lines])
            values[np.isinf(values)] = np.nan
            if np.isnan(values).any() and (nulls := sum(key in line and line[key] is None for line in lines)):
                self.nulls[key] += nulls
            columns[key] = values
        return columns

    def column(self, key: str) -> np.ndarray:
        """float64 (lines,): the values of `key`, NaN where a line has none."""
        return self._columns.get(key, np.full(self._length, np.nan))

    def rows(self, key: str) -> np.ndarray:
        """Indices of the lines that hold a (finite) value of `key`, ascending in step.

        Of several lines of one step the last counts: a run that was taken back to a checkpoint went over
        those steps again.
        """
        held = self._holding(key)[::-1]
        return held[np.unique(self.column("step")[held], return_index=True)[1]]

    def repeated(self, key: str) -> int:
        """How many lines with a value of `key` count no more, for a later one is of the same step."""
        return self._holding(key).size - self.rows(key).size

    def _holding(self, key: str) -> np.ndarray:
        needed = [self.column(name) for name in (key, "step", "compute/pflops")]
        return np.flatnonzero(np.isfinite(needed).all(axis=0))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex) -> dict[str, float]:
        values = ((key, column[index].item()) for key, column in self._columns.items())
        return {key: int(value) if value.is_integer() else value for key, value in values if not math.isnan(value)}

    def __iter__(self) -> Iterator[dict[str, float]]:
        return (self[index] for index in range(self._length))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan
