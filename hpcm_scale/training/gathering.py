"""What ZeRO-3 gathers of the weights, and keeps, in one forward and backward pass.

Follows DeepSpeed 0.19.8 (runtime/zero/partitioned_param_coordinator.py) once it knows the order of the layers, which is
from the third step on; two real processes send as much, within 1.5 % (tests/training).
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple


class Use(NamedTuple):
    """One use of a layer that has weights of its own."""

    backward: bool
    weights: tuple[tuple[str, int], ...]
    """Names, and numbers of elements."""


class Limits(NamedTuple):
    """DeepSpeed's settings, all in elements."""

    kept: int
    """Every process keeps tensors up to this size whole (stage3_param_persistence_threshold)."""
    reuse: int
    """A layer stays that is used again before so many others (stage3_max_reuse_distance)."""
    live: int
    """Nothing is fetched ahead beyond so many (stage3_max_live_parameters)."""
    ahead: int
    """Fetched ahead at a time (stage3_prefetch_bucket_size)."""


class Gathered(NamedTuple):
    """Elements per process, whole tensors."""

    elements: int
    """Gathered in all during one forward and backward pass; without those that are always there."""
    most: int
    """There at a time; without those that are always there."""
    always: int
    """Kept whole; gathered once per optimizer step."""


def gather(uses: list[Use], limits: Limits) -> Gathered:
    """Walk through the layers in the order in which they are used, fetching and giving back as DeepSpeed does."""
    sizes = {name: size for use in uses for name, size in use.weights}
    always = {name for name, size in sizes.items() if size <= limits.kept}
    here, elements, live, most = set(always), 0, 0, 0
    queue = deque((name, index) for index, use in enumerate(uses) for name, _ in use.weights)
    fetched_for = dict.fromkeys(sizes, -1)  # the last use that a tensor was fetched for, or found there
    since_forward: dict[tuple, int] = {}
    for index, use in enumerate(uses):
        names = [name for name, _ in use.weights]
        missing = {name for name in names if name not in here}
        here |= missing
        passed = {name for name in names if fetched_for[name] < index}
        while queue and passed:
            name, at = queue.popleft()
            fetched_for[name] = at
            passed.discard(name)
        room = min(limits.live - live - _count(missing, sizes), limits.ahead)
        early: set[str] = set()
        while queue and _count(early, sizes) < room:
            name, at = queue.popleft()
            fetched_for[name] = max(fetched_for[name], at)
            if name not in here:
                early.add(name)
        here |= early
        come = _count(missing | early, sizes)
        elements, live = elements + come, live + come
        most = max(most, live)
        # After the backward pass of a layer that is used several times it gives back only once, until its next forward.
        since_forward[use.weights] = since_forward.get(use.weights, 0) + 1 if use.backward else 0
        if since_forward[use.weights] <= 1:
            going = {name for name in names if name not in always and fetched_for[name] <= index + 1}
            going -= _used_soon(uses, index + 1, limits.reuse)
            here -= going
            live -= _count(going, sizes)
    return Gathered(elements, most, _count(always, sizes))


def _count(names: set[str], sizes: dict[str, int]) -> int:
    return sum(sizes[name] for name in names)


def _used_soon(uses: list[Use], start: int, distance: int) -> set[str]:
    soon: set[str] = set()
    passed = 0
    for use in uses[start:]:
        if passed >= distance:
            break
        soon.update(name for name, _ in use.weights)
        passed += sum(size for _, size in use.weights)
    return soon
