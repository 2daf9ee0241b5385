"""Times of alternating runs with quartiles of their ratios, time inside chosen functions, and peak memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from hpcm_scale.tracking.progress import progress


class Sample(NamedTuple):
    """One run of one candidate."""

    seconds: float
    """Wall-clock time, including the device's work."""
    result: Any
    """The return value."""


class Quartiles(NamedTuple):
    """A median over rounds with its quartiles."""

    median: float
    low: float
    high: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Median and quartiles of at least one number."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return Quartiles(float(median), float(low), float(high))


def ratio(over: Sequence[float], under: Sequence[float]) -> Quartiles:
    """Quartiles of over/under, round by round: both (rounds,), from the same rounds."""
    return quartiles([a / b for a, b in zip(over, under, strict=True)])


def seconds(samples: Sequence[Sample]) -> list[float]:
    """The times of a candidate's samples."""
    return [sample.seconds for sample in samples]


def timed(work: Callable[[], Any], device: torch.device) -> Sample:
    """Run once, and synchronize with the device before and after."""
    synchronize(device)
    began = time.perf_counter()
    result = work()
    synchronize(device)
    return Sample(time.perf_counter() - began, result)


def alternate(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    *,
    warm_up: int = 1,
    description: str = "",
) -> dict[str, list[Sample]]:
    """The samples of each candidate, one per round, after `warm_up` rounds that are dropped.

    Every other round runs in reverse order, so that no candidate always follows the same one. Garbage is collected
    between rounds only. `torch.utils.benchmark` times one candidate after the other, and other jobs of the machine
    would distort the ratios.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in candidates}
    with progress(total=(warm_up + rounds) * len(samples), description=description, unit="run") as bar:
        for number in range(-warm_up, rounds):
            with _no_garbage_collection():
                for name in list(samples)[:: -1 if number % 2 else 1]:
                    sample = timed(candidates[name], device)
                    if number >= 0:
                        samples[name].append(sample)
                    bar.update()
    return samples


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Stopwatch:
    """Adds up the time inside chosen functions; nested calls count once."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._depth, self._seconds = device, 0, 0.0

    def take(self) -> float:
        """The seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @contextmanager
    def on(self, functions: Sequence[tuple[Any, str]]) -> Iterator[None]:
        """Time functions and methods, each given by its module or class and its name there."""
        with ExitStack() as patches:
            for owner, name in functions:
                patches.enter_context(patch.object(owner, name, self._timed(getattr(owner, name))))
            yield

    def _timed(self, function: Callable) -> Callable:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            if self._depth == 0:
                synchronize(self._device)  # earlier work of the device does not count
            began = time.perf_counter()
            self._depth += 1
            try:
                return function(*arguments, **keywords)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._seconds += time.perf_counter() - began

        return wrapped


MEMORY_METHOD = {
    "cpu": "every allocation and release of torch's CPU allocator in one step, in order, from its profiler; "
    "includes the workspaces that kernels allocate there, not what libraries allocate elsewhere",
    "cuda": "torch.cuda.max_memory_allocated over one step, less what was allocated before it",
}
"""How `peak_bytes` measures, by type of device."""


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes of tensors during `work`, beyond those allocated before it; slow, not for timing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    # Releases of earlier allocations are not among the events: the profiler did not see them allocated.
    changes = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak
