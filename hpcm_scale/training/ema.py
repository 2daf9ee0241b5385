"""EMAs of the weights with power-function profiles (arXiv 2312.02696, section 3.1).

After t optimizer steps the EMA gives the weights after step τ a weight proportional to (τ / t)^γ. The noisy beginning
hardly counts, and a length relative to the training suits runs of any duration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch

from hpcm_scale.training.engines.base import CollectiveError, Engine
from hpcm_scale.training.state_shards import StateShard, ema_kind

FINEST = 2**14
"""Up to twice so many steps every step updates the EMAs, up to four times as many every second step, and so on."""


@cache  # used in every step
def exponent(length: float) -> float:
    """The exponent γ > 0 of the profile with standard deviation `length`, relative to the training so far.

    Solves `length`² · (γ + 2)² · (γ + 3) = γ + 1 for 0 < `length` < 1/√12 (arXiv 2312.02696, section 3.1).
    """
    return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())


def previous_update(updates: int) -> int | None:
    """The last step before step `updates` that updated the EMAs; None if this step does not update them.

    In long trainings the weight of a single step, (γ + 1) / t, would fall below the precision of fp32.
    """

    def stride(updates: int) -> int:
        return 1 << max(0, (updates // FINEST).bit_length() - 1)

    return None if updates % stride(updates) else updates - stride(updates - 1)


class EMA:
    """EMAs of the weights of one rank, as state shards; works with any engine.

    Only steps that changed the weights count: a skipped step leaves the EMAs unchanged.
    """

    def __init__(self, engine: Engine, lengths: Sequence[float]) -> None:
        """Start from the current weights, one EMA for each of `lengths`."""
        self._engine = engine
        self._weights = [shard for shard in engine.state_shards() if shard.kind == "weight"] if lengths else []
        self._averages = {
            length: [shard._replace(kind=ema_kind(length), values=shard.values.clone()) for shard in self._weights]
            for length in lengths
        }
        self._updates = 0

    @property
    def lengths(self) -> list[float]:
        """Standard deviations of the profiles, relative to the training so far."""
        return list(self._averages)

    def state_shards(self) -> list[StateShard]:
        """The shards of all EMAs, which a checkpoint holds besides the engine's."""
        return [shard for average in self._averages.values() for shard in average]

    def load(self, updates: int) -> None:
        """Continue from values written to `state_shards`, as after `updates` steps."""
        self._updates = updates

    def update(self) -> None:
        """Update the EMAs from the weights after one more step (arXiv 2312.02696, equation 8)."""
        self._updates += 1
        before = previous_update(self._updates)
        if before is None:
            return
        for length, average in self._averages.items():
            decay = (before / self._updates) ** (exponent(length) + 1)
            torch._foreach_lerp_(_values(average), _values(self._weights), 1 - decay)

    @contextmanager
    def in_place(self, length: float) -> Iterator[None]:
        """Context in which the model has the EMA as its weights; restores them exactly. Called by all ranks.

        They are also restored after CollectiveError, but not after other errors, which end the run.
        """
        self._swap(length)
        try:
            yield
        except CollectiveError:
            self._swap(length)
            raise
        self._swap(length)

    def _swap(self, length: float) -> None:
        """Exchange weights and EMA shard by shard, since there may be no memory for a second model."""
        for weight, average in zip(self._weights, self._averages[length], strict=True):
            copy = weight.values.clone()
            weight.values.copy_(average.values)
            average.values.copy_(copy)
        self._engine.load_master_weights(self._updates)


def _values(shards: Sequence[StateShard]) -> list[torch.Tensor]:
    return [shard.values for shard in shards]
