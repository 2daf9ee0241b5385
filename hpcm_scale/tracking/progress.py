"""Progress of the first process: a bar on a terminal, a line now and then in a pipe or a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

from hpcm_scale.errors import is_first_process

PRINT_SECONDS = 30.0
"""Between two lines."""
_UNDER_WAY = "{desc}: {n_fmt}/{total_fmt} {unit}s, {rate_fmt}, {remaining} left"
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
    """A bar on stderr with rate and time left; where stderr is no terminal, a line every `seconds`.

    Iterate over it, or call its `update(n)`; `initial` is where a resumed count starts. Silent on other processes.
    What takes less than `seconds` has no line, unless it is to `report` its end. `text` is asked for what a line says,
    in place of count, rate and time left.
    """
    common = {"total": total, "initial": initial, "desc": description, "unit": unit, "file": sys.stderr}
    if not is_first_process():
        return tqdm(iterable, disable=True, **common)
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **common)
    return _Lines(iterable, text, report, mininterval=seconds, delay=seconds, miniters=1, **common)


class _Lines(tqdm):
    """Writes whole lines; nothing is overwritten."""

    monitor_interval = 0  # no thread: each update looks at the clock

    def __init__(
        self, iterable: Iterable[Any] | None, text: Callable[[], str] | None, report: bool, **options: Any
    ) -> None:
        self._text, self._report = text, report
        super().__init__(iterable, bar_format=_UNDER_WAY, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line."""
        self.fp.write(f"{self._text() if self._text else self}\n")
        self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Nothing is in the way of another line."""

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        """Write something else, by default to stdout, without repeating a line."""
        print(s, file=file or sys.stdout, end=end, flush=True)

    def close(self) -> None:
        """Report the end of what has had a line before, or is to have one."""
        if self.disable:
            return
        if self._report or (self.last_print_t > self.start_t and not self._text):
            self.bar_format = _DONE
            self.display()
        self.disable = True
        self._decr_instances(self)
