"""Progress of rank 0: a bar on a terminal, periodic lines in a pipe or a log file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from hpcm_scale.errors import is_first_process

PRINT_SECONDS = 30.0
"""Interval between lines."""
_RUNNING = "{desc}: {n_fmt}/{total_fmt} {unit}s, {rate_fmt}, {remaining} left"
_DONE = "{desc}: {n_fmt}/{total_fmt} {unit}s in {elapsed}"


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    description: str = "",
    unit: str = "it",
    seconds: float = PRINT_SECONDS,
    text: Callable[[], str] | None = None,
    report: bool = False,
) -> tqdm:
    """A tqdm bar on stderr; if stderr is not a terminal, a line every `seconds`. Silent on other ranks.

    Iterate over it, or call `update(n)`.

    Args:
        initial: start of a resumed count.
        text: returns the text of a line, instead of count, rate and time left.
        report: print a last line also if the work took less than `seconds`.
    """
    common = {"total": total, "initial": initial, "desc": description, "unit": unit, "file": sys.stderr}
    if not is_first_process():
        return tqdm(iterable, disable=True, **common)
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **common)
    return _Lines(iterable, text, report, mininterval=seconds, delay=seconds, miniters=1, **common)


class _Lines(tqdm):
    """A bar that writes whole lines and overwrites nothing."""

    monitor_interval = 0  # no monitor thread: each update checks the clock

    def __init__(
        self, iterable: Iterable[Any] | None, text: Callable[[], str] | None, report: bool, **options: Any
    ) -> None:
        self._text, self._report = text, report
        super().__init__(iterable, bar_format=_RUNNING, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line."""
        self.fp.write(f"{self._text() if self._text else self}\n")
        self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Nothing to clear."""

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        """Print other text, by default to stdout, without repeating a line."""
        print(s, file=file or sys.stdout, end=end, flush=True)

    def close(self) -> None:
        """Print the last line if there was one before, or if `report`."""
        if self.disable:
            return
        if self._report or (self.last_print_t > self.start_t and not self._text):
            self.bar_format = _DONE
            self.display()
        self.disable = True
        self._decr_instances(self)  # pyright: ignore[reportAttributeAccessIssue]
