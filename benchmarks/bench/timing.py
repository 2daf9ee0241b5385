"""The most memory that a piece of work holds at a time, from the allocator's own books."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from hpcm_scale.tracking.timing import synchronize

# The time that goes by within chosen functions, wherever they are called from.


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


HOW = {
    "cpu": "every allocation and release of torch's CPU allocator in one step, in order, from its profiler; what "
    "kernels take for themselves through that allocator counts, what libraries take behind it does not",
    "cuda": "torch.cuda.max_memory_allocated over one step, less what was allocated before it",
}
"""How it is measured, by kind of device."""


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most bytes of tensors that `work` holds at a time beyond those that there were before it.

    What the work is to find in place (weights, gradients, inputs) is not counted; what it leaves behind is.
    Slower than the work itself: not for timing.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    # Releases of what was there before are not among them: the allocator did not see it come.
    changes = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak
