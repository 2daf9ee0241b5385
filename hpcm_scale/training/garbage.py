"""Python's garbage collection between steps, not within them: there it would keep one process, and so all, waiting."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 100
"""Steps from one collection to the next; every tenth is of everything."""


@contextmanager
def collecting_between_steps() -> Iterator[Callable[[int], None]]:
    """Within it nothing is collected but by what it gives: a function to call after each step, with its number.

    All processes call it at the same steps, and so wait together.
    """

    def after(step: int) -> None:
        if step % EVERY == 0:
            gc.collect(2 if step % (10 * EVERY) == 0 else 1)

    enabled = gc.isenabled()
    gc.disable()
    try:
        yield after
    finally:
        if enabled:
            gc.enable()
