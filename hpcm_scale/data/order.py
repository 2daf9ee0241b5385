"""The order of images, a pure function of the seed: global, whatever the processes and workers.

Global image index i counts the images since training began; epoch i // size visits every sample once.
The numbers come from the raw stream of Philox (Salmon et al., 2011), keyed on (seed, epoch), which
NumPy keeps the same between its versions; its distributions and shuffles it does not.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

ORDER, AUGMENTATION = 0, 1
"""What numbers are for: separate streams of the same key."""


def random_words(seed: int, epoch: int, purpose: int, sample: int, count: int) -> np.ndarray:
    """`count` random uint64, a pure function of the other arguments."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    counter = np.array([0, sample, purpose, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


@lru_cache(maxsize=3)  # a batch may straddle two epochs, and what replaces a photo is of the next
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The samples of one epoch in the order they are visited: a read-only permutation, int64 (size,)."""
    order = np.argsort(random_words(seed, epoch, ORDER, 0, size), kind="stable")
    order.setflags(write=False)
    return order


def sample_at(seed: int, image: int, size: int) -> int:
    """Which of `size` samples is the global image index `image`."""
    epoch, position = divmod(image, size)
    return int(epoch_order(seed, epoch, size)[position])
