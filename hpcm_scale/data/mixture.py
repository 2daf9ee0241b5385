"""Several sets of shards, mixed in fixed shares: which photo of which set comes when."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate

import numpy as np

from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data.index import ShardIndex, load_index
from hpcm_scale.errors import UserError

# The order of images, a pure function of the seed: global, whatever the processes and workers.
#
# Global image index i counts the images since training began; epoch i // size visits every sample once.
# The numbers come from the raw stream of Philox (Salmon et al., 2011), keyed on (seed, epoch), which
# NumPy keeps the same between its versions; its distributions and shuffles it does not.


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


BLOCK, LARGEST_BLOCK = 2**10, 2**20
"""Places that are drawn together: so many, or more where a set would not get one of them."""


@dataclass(frozen=True)
class Mixture:
    """One set of shards, or several."""

    locations: list[str]
    """Of data.shards, and of each of data.more_shards."""
    indices: list[ShardIndex]
    shares: list[Fraction]
    """Of each in what is trained on; their sum is 1."""

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal: two mixtures with one digest train alike. Of a single set, that of its index."""
        digests = [index.digest for index in self.indices]
        if len(digests) == 1:
            return digests[0]
        content = json.dumps([digests, [str(share) for share in self.shares]])
        return hashlib.sha256(content.encode()).hexdigest()


def load_mixture(config: DataConfig, open_index: Callable[..., ShardIndex] = load_index) -> Mixture:
    """Read the indices of `config.shards` and of all of `config.more_shards`, each once, with `open_index`.

    Their shares are as `config.weights`, exact as decimal numbers, or as their numbers of photos. Raises `UserError`
    as `load_index` does, for sets without photos or with the same photos, and for a share that is all but nothing.
    """
    locations = [config.shards, *config.more_shards]
    indices = [
        open_index(location, retries=config.retries, timeout=config.timeout, pipe=config.pipe) for location in locations
    ]
    _check_distinct(locations, indices)
    weights = [Fraction(str(weight)) for weight in config.weights or [len(index) for index in indices]]
    shares = [weight / sum(weights) for weight in weights]
    for location, share in zip(locations, shares, strict=True):
        if 0 < share * LARGEST_BLOCK < 1:
            raise UserError(
                f"data.weights give {location} less than one image in {LARGEST_BLOCK:,}; give it more, or leave it out"
            )
    return Mixture(locations, indices, shares)


def _check_distinct(locations: Sequence[str], indices: Sequence[ShardIndex]) -> None:
    seen: dict[str, str] = {}
    for location, index in zip(locations, indices, strict=True):
        if not len(index):
            raise UserError(f"the shards at {location} hold no photos; build them again, or name others")
        if index.digest in seen:
            raise UserError(
                f"data.shards and data.more_shards name the same photos twice, at {seen[index.digest]} and {location}; "
                "name each set once, and give its share with data.weights"
            )
        seen[index.digest] = location


class MixtureOrder:
    """The set of each global image index, and which of its photos: a pure function of the seed and the shares.

    The places are drawn in blocks of a fixed length, `BLOCK` unless a share is less than one place of it. When b
    blocks have been drawn, a set with share s has had b · length · s places, rounded up or down to a whole number: in
    the long run the shares are exact. Inside a block its places are permuted.
    """

    def __init__(self, seed: int, shares: Sequence[Fraction]) -> None:
        least = min(share for share in shares if share)
        self.length = BLOCK
        while self.length * least < 1:
            self.length *= 2
        self._seed = seed
        self._bounds = list(accumulate(shares, initial=Fraction(0)))
        self._drawn = lru_cache(maxsize=2)(self._draw)  # a batch may straddle two blocks

    def turn_at(self, image: int) -> tuple[int, int]:
        """The set of the global image index `image`, and how many images of this set come before."""
        block, place = divmod(image, self.length)
        sets, turns = self._drawn(block)
        return int(sets[place]), int(turns[place])

    def turns_before(self, image: int) -> list[int]:
        """How many images of each set come before the global image index `image`."""
        block, place = divmod(image, self.length)
        sets, _ = self._drawn(block)
        inside = np.bincount(sets[:place], minlength=len(self._bounds) - 1)
        return (self._before(block) + inside).tolist()

    def _before(self, block: int) -> np.ndarray:
        """How many images of each set come before a block, int64."""
        # Rounded down at the bounds between the sets, they add up to block · length. From one block to the next each
        # grows by more than length · share − 2: with at least one place of a block to a set, none falls.
        return np.diff([math.floor(block * self.length * bound) for bound in self._bounds])

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each place of a block its set, and how many images of this set come before: int64 (length,) both."""
        before, after = self._before(block), self._before(block + 1)
        order = np.argsort(random_words(self._seed, block, MIXTURE, 0, self.length), kind="stable")
        sets = np.repeat(np.arange(len(before)), after - before)[order]
        turns = np.empty_like(sets)
        turns[np.argsort(sets, kind="stable")] = np.concatenate([*map(np.arange, before, after)])
        return sets, turns
