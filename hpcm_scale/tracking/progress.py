"""Progress bars on the terminal of the first process."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from hpcm_scale.errors import is_first_process


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    description: str = "",
    unit: str = "it",
) -> tqdm:
    """A bar on stderr with rate and time left; silent on other processes and when stderr is no terminal.

    Iterate over it, or call its `update(n)`; `initial` is where a resumed count starts.
    """
    return tqdm(
        iterable,
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        file=sys.stderr,
        disable=not (is_first_process() and sys.stderr.isatty()),
        dynamic_ncols=True,
    )
