"""The order of images, a pure function of the seed: global, whatever the processes and workers.

Global image index i counts the images since training began; epoch i // size visits every sample once.
The numbers come from the raw stream of Philox (Salmon et al., 2011), keyed on (seed, epoch), which
NumPy keeps the same between its versions; its distributions and shuffles it does not.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np

ORDER, AUGMENTATION, MIXTURE, SETS = 0, 1, 2, 3
"""What numbers are for: separate streams of the same key."""


def random_words(seed: int, epoch: int, purpose: int, sample: int, count: int) -> np.ndarray:
    """`count` random uint64, a pure function of the other arguments."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    counter = np.array([0, sample, purpose, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The samples of one epoch in the order they are visited: a read-only permutation, int64 (size,)."""
    order = np.argsort(random_words(seed, epoch, ORDER, 0, size), kind="stable")
    order.setflags(write=False)
    return order


class SetOrder:
    """The order in which a set of `size` samples is visited, epoch after epoch."""

    def __init__(self, seed: int, size: int) -> None:
        self.size = size
        # A batch may straddle two epochs, and what replaces a photo is of the next.
        self._epoch = lru_cache(maxsize=3)(partial(epoch_order, seed, size=size))

    def sample_at(self, turn: int) -> int:
        """The sample that is visited after `turn` others."""
        epoch, position = divmod(turn, self.size)
        return int(self._epoch(epoch)[position])


@lru_cache(maxsize=1)
def _set_order(seed: int, size: int) -> SetOrder:
    return SetOrder(seed, size)


def sample_at(seed: int, image: int, size: int) -> int:
    """Which of `size` samples is the global image index `image`, where they are all that is trained on."""
    return _set_order(seed, size).sample_at(image)


def set_seed(seed: int, number: int) -> int:
    """The seed of order and crops of one of several sets, counted from 0: of the first, that of the run."""
    return int(random_words(seed, 0, SETS, number, 1)[0]) if number else seed
