"""The time that goes by within chosen functions, wherever they are called from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from hpcm_scale.benchmark.paired import synchronize


class Stopwatch:
    """Adds up seconds; a function called by a watched one is not counted twice."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._depth, self._seconds = device, 0, 0.0

    def take(self) -> float:
        """The seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @contextmanager
    def on(self, functions: Sequence[tuple[Any, str]]) -> Iterator[None]:
        """Watch functions and methods, each named by its module or class and its name in there."""
        with ExitStack() as watched:
            for owner, name in functions:
                watched.enter_context(patch.object(owner, name, self._timed(getattr(owner, name))))
            yield

    def _timed(self, function: Callable) -> Callable:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            if self._depth == 0:
                synchronize(self._device)  # what was given to the device before is not the function's
            began = time.perf_counter()
            self._depth += 1
            try:
                return function(*arguments, **keywords)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._seconds += time.perf_counter() - began

        return wrapped
