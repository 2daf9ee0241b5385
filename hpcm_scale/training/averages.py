"""Moving averages of the weights, whose lengths grow with the training (arXiv 2312.02696, section 3.1).

The average after t optimizer steps weighs the weights after step τ by the power function (τ / t)^γ: those of the
noisy beginning hardly count, and no length has to be chosen again for a longer run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch

from hpcm_scale.training.engines.base import Engine, FailedTogether
from hpcm_scale.training.state_shards import Piece


@cache  # asked for in every step
def exponent(length: float) -> float:
    """The exponent γ > 0 of the profile whose standard deviation is `length` times the training so far, 0 < `length` <
    1/√12 (the same, section 3.1): `length`² · (γ + 2)² · (γ + 3) = γ + 1."""
    return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())


def kind_of(length: float) -> str:
    """What the pieces of the average of that length are called."""
    return f"ema_{length}"


FINEST = 2**14
"""Of so many steps each one is taken in; of twice as many every second one, and so on."""


def taken_in_before(updates: int) -> int | None:
    """Of the steps before step `updates` the last that was taken into the averages; None if this one is not to be.

    The weight of a single step, (γ + 1) / t, would come to lie below the precision of fp32 in long trainings, and the
    averages would stand still.
    """

    def stride(updates: int) -> int:
        return 1 << max(0, (updates // FINEST).bit_length() - 1)

    return None if updates % stride(updates) else updates - stride(updates - 1)


class Averages:
    """The averages of the weights that one process holds, as shards beside them: whatever engine shards the weights.

    Steps are those that changed the weights: one that is left out leaves the averages as they are, too.
    """

    def __init__(self, engine: Engine, lengths: Sequence[float]) -> None:
        """They begin as what the weights are now."""
        self._engine = engine
        self._weights = [piece for piece in engine.pieces() if piece.kind == "weight"] if lengths else []
        self._averages = {
            length: [piece._replace(kind=kind_of(length), values=piece.values.clone()) for piece in self._weights]
            for length in lengths
        }
        self._updates = 0

    @property
    def lengths(self) -> list[float]:
        """Standard deviations of the profiles, relative to the training so far."""
        return list(self._averages)

    def pieces(self) -> list[Piece]:
        """All of them: what a checkpoint holds beside the engine's pieces."""
        return [piece for average in self._averages.values() for piece in average]

    def load(self, updates: int) -> None:
        """Go on from what has been written to the pieces, as after `updates` steps."""
        self._updates = updates

    def update(self) -> None:
        """Take in what the weights are after one more step (the same, equation 8)."""
        self._updates += 1
        before = taken_in_before(self._updates)
        if before is None:
            return
        for length, average in self._averages.items():
            kept = (before / self._updates) ** (exponent(length) + 1)
            torch._foreach_lerp_(_values(average), _values(self._weights), 1 - kept)

    @contextmanager
    def in_place(self, length: float) -> Iterator[None]:
        """Within it the model has the average for its weights, and afterwards its own again, to the bit.

        Every process calls it. After FailedTogether, too, they are put back; after another error they are not, which
        would take all processes: it ends the run.
        """
        self._exchange(length)
        try:
            yield
        except FailedTogether:
            self._exchange(length)
            raise
        self._exchange(length)

    def _exchange(self, length: float) -> None:
        """Have weights and average change places, piece by piece: there need not be room for a second model."""
        for weight, average in zip(self._weights, self._averages[length], strict=True):
            kept = weight.values.clone()
            weight.values.copy_(average.values)
            average.values.copy_(kept)
        self._engine.take_over(self._updates)


def _values(pieces: Sequence[Piece]) -> list[torch.Tensor]:
    return [piece.values for piece in pieces]
