"""The order of the training images: a mixture of shard sets, and a permutation of each set per epoch.

Global image index i counts the images since training began. Which sample it is depends on the seed, the sets and their
weights only, never on the number of processes or data workers. webdataset is used for its tar format, its pipeline and
its writer; its shuffling is not, because it depends on both.

Random numbers are the raw stream of Philox (Salmon et al., 2011) keyed on (seed, epoch), which NumPy keeps the same
between versions, unlike its distributions and shuffles.
"""

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

from hpcm_scale.config.schema import DataConfig, ShardSet
from hpcm_scale.data.index import ShardIndex, load_index
from hpcm_scale.errors import UserError

ORDER, AUGMENTATION, MIXTURE, SETS = 0, 1, 2, 3
"""Purposes of random numbers: separate streams of the same key."""
BLOCK, LARGEST_BLOCK = 2**10, 2**20
"""Global image indices whose sets are drawn together; doubled until every set gets one of them."""


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
        # A batch may straddle two epochs, and a corrupt sample is replaced from the next.
        self._epoch = lru_cache(maxsize=3)(partial(epoch_order, seed, size=size))

    def sample_at(self, position: int) -> int:
        """The sample at a position of this order, counted over all epochs from 0."""
        epoch, place = divmod(position, self.size)
        return int(self._epoch(epoch)[place])


_set_order = lru_cache(maxsize=1)(SetOrder)


def sample_at(seed: int, image: int, size: int) -> int:
    """The sample of global image index `image` in training on a single set of `size` samples."""
    return _set_order(seed, size).sample_at(image)


def set_seed(seed: int, number: int) -> int:
    """The seed of order and crops of set `number` of a mixture; the first set has the seed of the run."""
    return int(random_words(seed, 0, SETS, number, 1)[0]) if number else seed


@dataclass(frozen=True)
class Mixture:
    """The shard sets of data.shards, opened."""

    locations: list[str]
    """Folder or URL of each set."""
    indices: list[ShardIndex]
    shares: list[Fraction]
    """Of each set in the training images; they sum to 1."""

    @property
    def images(self) -> int:
        """Number of images in all sets that are used."""
        return sum(len(index) for index, share in zip(self.indices, self.shares, strict=True) if share)

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal: two mixtures with one digest give the same images. Of a single set, its index's."""
        digests = [index.digest for index in self.indices]
        if len(digests) == 1:
            return digests[0]
        content = json.dumps([digests, [str(share) for share in self.shares]])
        return hashlib.sha256(content.encode()).hexdigest()


def load_mixture(config: DataConfig, open_index: Callable[..., ShardIndex] = load_index) -> Mixture:
    """Read the indices of all sets of `config.shards`, each once, with `open_index`.

    Raises `UserError` as `load_index` does, for an empty set, for two sets with the same images, and for a share below
    one image in `LARGEST_BLOCK`.
    """
    locations = [each.path for each in config.sets]
    indices = [
        open_index(location, retries=config.retries, timeout=config.timeout, pipe=config.pipe) for location in locations
    ]
    _check_distinct(locations, indices)
    shares = _shares(config.sets, [len(index) for index in indices])
    for location, share in zip(locations, shares, strict=True):
        if 0 < share * LARGEST_BLOCK < 1:
            raise UserError(
                "weight-too-small",
                "data.shards",
                f"the weights of data.shards give {location} less than one image in {LARGEST_BLOCK:,}; "
                "give it a larger weight, or remove it",
            )
    return Mixture(locations, indices, shares)


def _shares(sets: Sequence[ShardSet], sizes: Sequence[int]) -> list[Fraction]:
    """The share of each set, exact for weights that are decimal numbers; see `ShardSet.weight`."""
    unweighted = [size for each, size in zip(sets, sizes, strict=True) if each.weight is None]
    weights = [
        Fraction(size * len(unweighted), sum(unweighted)) if each.weight is None else Fraction(str(each.weight))
        for each, size in zip(sets, sizes, strict=True)
    ]
    return [weight / sum(weights) for weight in weights]


def _check_distinct(locations: Sequence[str], indices: Sequence[ShardIndex]) -> None:
    seen: dict[str, str] = {}
    for location, index in zip(locations, indices, strict=True):
        if not len(index):
            raise UserError(
                "empty-shards",
                "data.shards",
                f"the shards at {location} contain no images; build them again, or give others",
            )
        if index.digest in seen:
            raise UserError(
                "duplicate-shards",
                "data.shards",
                f"data.shards lists the same images twice, at {seen[index.digest]} and {location}; list each set "
                "once, with a weight",
            )
        seen[index.digest] = location


class MixtureOrder:
    """The set of each global image index, and its position in that set's order: a function of seed and shares.

    Sets are drawn in blocks of a fixed length, `BLOCK` unless a share is less than one index of it. After b blocks, a
    set with share s has had b · length · s images, rounded up or down: in the long run the shares are exact. The
    indices of a block are permuted.
    """

    def __init__(self, seed: int, shares: Sequence[Fraction]) -> None:
        least = min(share for share in shares if share)
        self.length = BLOCK
        while self.length * least < 1:
            self.length *= 2
        self._seed = seed
        self._bounds = list(accumulate(shares, initial=Fraction(0)))
        self._drawn = lru_cache(maxsize=2)(self._draw)  # a batch may straddle two blocks

    def position_at(self, image: int) -> tuple[int, int]:
        """The set of global image index `image`, and how many images of this set come before."""
        block, place = divmod(image, self.length)
        sets, positions = self._drawn(block)
        return int(sets[place]), int(positions[place])

    def positions_before(self, image: int) -> list[int]:
        """How many images of each set come before global image index `image`."""
        block, place = divmod(image, self.length)
        sets, _ = self._drawn(block)
        inside = np.bincount(sets[:place], minlength=len(self._bounds) - 1)
        return (self._before(block) + inside).tolist()

    def _before(self, block: int) -> np.ndarray:
        """How many images of each set come before a block, int64."""
        # Rounded down at the bounds between the sets, they add up to block · length. From one block to the next each
        # grows by more than length · share − 2: with at least one index of a block to a set, none falls.
        return np.diff([math.floor(block * self.length * bound) for bound in self._bounds])

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The set of each index of a block, and how many images of this set come before: int64 (length,) both."""
        before, after = self._before(block), self._before(block + 1)
        order = np.argsort(random_words(self._seed, block, MIXTURE, 0, self.length), kind="stable")
        sets = np.repeat(np.arange(len(before)), after - before)[order]
        positions = np.empty_like(sets)
        positions[np.argsort(sets, kind="stable")] = np.concatenate([*map(np.arange, before, after)])
        return sets, positions
