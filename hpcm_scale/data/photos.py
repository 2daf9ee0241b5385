"""The training crop at every place of the order, whatever becomes of single photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, count, islice
from typing import NamedTuple
from zlib import crc32

import torch

from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data.cache import CachedStorage
from hpcm_scale.data.images import EncodedImage, cut, to_array
from hpcm_scale.data.index import ShardIndex
from hpcm_scale.data.mixture import Mixture, MixtureOrder, SetOrder, set_seed
from hpcm_scale.data.storage import LocalStorage, Storage, Unreadable, open_storage
from hpcm_scale.errors import UserError

ATTEMPTS = 10
"""Epochs that are asked for a photo for one place, before all is taken to be bad."""


class BadPhoto(NamedTuple):
    """A photo that cannot be had."""

    sample: int
    """Its number in the set; with several sets, in all of them one after the other."""
    reason: str
    """One sentence that names the sample and its shard."""


class Crop(NamedTuple):
    """What is trained on at one place of the order."""

    image: int
    """Global image index of the place."""
    key: str
    """Of the sample in the shards."""
    pixels: torch.Tensor
    """uint8 (3, crop, crop), RGB."""
    upscaled: bool
    """Whether the photo was smaller than the crop and was scaled up to it."""
    bad: list[BadPhoto]
    """Photos whose turn it would have been."""


class Damaged(ValueError):
    """Bytes that are not those that were stored."""


class Photos:
    """Reads and crops the photos of a set. Close it after use.

    A photo that cannot be had is replaced by the one at the same place of the next epoch, cropped as in that epoch;
    if that is bad, too, by that of the epoch after, and so on. So are the global image indices in `left_out`. What
    comes is a pure function of the seed, the set, `left_out`, and which photos are bad.

    Where the set is one of several, `left_out` is in its own turns, and `first_sample` photos are in sets before it.
    """

    def __init__(
        self, config: DataConfig, index: ShardIndex, seed: int, left_out: Sequence[range], first_sample: int = 0
    ) -> None:
        self.config = config
        self.index = index
        self.seed = seed
        self.left_out = left_out
        self.first_sample = first_sample
        self.order = SetOrder(seed, len(index))
        self.storage = open_set(config, index)

    def crop_at(self, image: int, turn: int | None = None) -> Crop:
        """The crop for the place `image`; where the set is one of several, `turn` photos of it come before.

        Raises `UserError` if neither its photo nor any in its place can be had, and at once for what no other photo
        would mend.
        """
        size = len(self.index)
        bad: dict[int, BadPhoto] = {}
        own = count(image if turn is None else turn, size)
        turns = (turn for turn in own if not any(turn in span for span in self.left_out))
        for turn in islice(turns, ATTEMPTS):
            sample = self.order.sample_at(turn)
            if sample in bad:
                continue
            crop, flip, epoch = self.config.crop, self.config.flip, turn // size
            try:
                photo = EncodedImage(self.stored(sample))
                downscale = self.config.downscale if photo.is_jpeg else 1.0
                square, upscaled = cut(
                    photo, crop, flip, seed=self.seed, epoch=epoch, sample=sample, downscale=downscale
                )
            except (OSError, ValueError) as error:
                bad[sample] = BadPhoto(self.first_sample + sample, self._reason(sample, error))
                continue
            pixels = torch.from_numpy(to_array(square))
            return Crop(image, self.index.keys[sample], pixels, upscaled, list(bad.values()))
        *_, last = bad.values()
        tried = "one photo was" if len(bad) == 1 else f"{len(bad)} photos were"
        raise UserError(
            f"{tried} tried for global image {image} and none can be had (the last: {last.reason}); restore the "
            "shards, `hpcm shards verify` lists all damage"
        )

    def stored(self, sample: int) -> bytes:
        """The image file of a sample, as it was stored; asked for again once where something is held that may have
        been replaced. Raises `OSError` or `Damaged`."""
        name = self.index.shards[self.index.shard[sample]].name
        try:
            return self._read(name, sample)
        except Unreadable:
            raise
        except (OSError, Damaged):
            self.storage.renew(name)
            return self._read(name, sample)

    def close(self) -> None:
        """Close files and connections."""
        self.storage.close()

    def _read(self, name: str, sample: int) -> bytes:
        offset, length = int(self.index.offset[sample]), int(self.index.length[sample])
        data = self.storage.read(name, offset, offset + length)
        if len(data) != length or crc32(data) != self.index.crc32[sample]:
            raise Damaged("is damaged")
        return data

    def _reason(self, sample: int, error: Exception) -> str:
        place = self.storage.describe(self.index.shards[self.index.shard[sample]].name)
        if isinstance(error, Damaged):
            what = str(error)
        elif isinstance(error, Unreadable):
            what = f"cannot be read {error}"
        elif isinstance(error, FileNotFoundError):
            what = "cannot be read: the shard is not there"
        elif isinstance(error, OSError):
            what = f"cannot be read: {error.strerror or error}"
        else:
            what = f"does not decode: {error}"
        return f"sample {self.index.keys[sample]} in {place} {what}"


class MixedPhotos:
    """Reads and crops the photos of all sets of a mixture. Close it after use.

    A photo that cannot be had is replaced by one of its own set, as `Photos` says.
    """

    def __init__(self, config: DataConfig, mixture: Mixture, seed: int, left_out: Sequence[range]) -> None:
        self.order = MixtureOrder(seed, mixture.shares)
        spans = [(self.order.turns_before(span.start), self.order.turns_before(span.stop)) for span in left_out]
        first_samples = accumulate((len(index) for index in mixture.indices), initial=0)
        self.sets = [
            Photos(
                replace(config, shards=location),
                index,
                set_seed(seed, number),
                [range(first[number], last[number]) for first, last in spans],
                first_sample,
            )
            for number, (location, index, first_sample) in enumerate(
                zip(mixture.locations, mixture.indices, first_samples, strict=False)
            )
        ]

    def crop_at(self, image: int) -> Crop:
        """The crop for the place `image`. Raises as `Photos.crop_at`."""
        number, turn = self.order.turn_at(image)
        return self.sets[number].crop_at(image, turn)

    def close(self) -> None:
        """Close files and connections."""
        for photos in self.sets:
            photos.close()


def open_set(config: DataConfig, index: ShardIndex) -> Storage | CachedStorage:
    """The storage of a set of shards, behind a cache if it is far away and one is configured."""
    storage = open_storage(config.shards, retries=config.retries, timeout=config.timeout, pipe=config.pipe)
    if config.cache is None or isinstance(storage, LocalStorage):
        return storage
    return CachedStorage(storage, config.cache, index.shards)
