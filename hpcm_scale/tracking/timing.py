"""Times of alternating runs, and their ratio with an interval."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from hpcm_scale.tracking.progress import progress


class Turn(NamedTuple):
    """One run of one contestant."""

    seconds: float
    """Wall-clock time until the device has done its work."""
    result: Any
    """What it gave."""


class Spread(NamedTuple):
    """A median over rounds and the quartiles around it."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one number."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return Spread(float(median), float(low), float(high))


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """How many times the one is the other, round by round: both (rounds,), from the same rounds."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def seconds(turns: Sequence[Turn]) -> list[float]:
    """The times of a contestant's turns."""
    return [turn.seconds for turn in turns]


def timed(work: Callable[[], Any], device: torch.device) -> Turn:
    """Run once, and wait for the device before and after."""
    synchronize(device)
    began = time.perf_counter()
    result = work()
    synchronize(device)
    return Turn(time.perf_counter() - began, result)


def alternate(
    contestants: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    *,
    warm_up: int = 1,
    description: str = "",
) -> dict[str, list[Turn]]:
    """The turns of each contestant, one a round; those of `warm_up` rounds before are not kept.

    Every other round goes backwards, so that none always follows the same one. Garbage is collected between
    the rounds only.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in contestants}
    with progress(total=(warm_up + rounds) * len(turns), description=description, unit="run") as bar:
        for number in range(-warm_up, rounds):
            with _no_garbage_collection():
                for name in list(turns)[:: -1 if number % 2 else 1]:
                    turn = timed(contestants[name], device)
                    if number >= 0:
                        turns[name].append(turn)
                    bar.update()
    return turns


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
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
