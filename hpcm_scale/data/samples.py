"""The training crop of every global image index; corrupt samples are replaced."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, count, islice
from typing import NamedTuple
from zlib import crc32

import torch

from hpcm_scale.config.schema import DataConfig
from hpcm_scale.data.cache import CachedStorage
from hpcm_scale.data.images import EncodedImage, cut, to_array
from hpcm_scale.data.index import ShardIndex
from hpcm_scale.data.mixture import Mixture, MixtureOrder, SetOrder, set_seed
from hpcm_scale.data.storage import LocalStorage, Unreadable, open_storage
from hpcm_scale.errors import UserError

ATTEMPTS = 10
"""Epochs searched for a replacement before the whole set counts as corrupt."""


class CorruptSample(NamedTuple):
    """A sample that cannot be read or decoded."""

    sample: int
    """Its number in the set; in a mixture, in all sets one after the other."""
    reason: str
    """One sentence that names the sample and its shard."""


class Crop(NamedTuple):
    """The training crop of one global image index."""

    image: int
    """Global image index."""
    key: str
    """Key of the sample in the shards."""
    pixels: torch.Tensor
    """uint8 (3, crop, crop), RGB."""
    upscaled: bool
    """Whether the image was smaller than the crop and was scaled up."""
    corrupt: list[CorruptSample]
    """Samples that this one replaces."""


class Damaged(ValueError):
    """The bytes of a sample differ from those that were stored."""


class SampleReader:
    """Reads and crops the samples of one set. Close it after use.

    A corrupt sample is replaced by the one at the same position of the next epoch, cropped as in that epoch; if that is
    corrupt, too, by the one of the epoch after, and so on. Positions in `skip` are replaced likewise. The crops are a
    pure function of the seed, the set, `skip` and which samples are corrupt.

    Args:
        location: folder, URL or `pipe:COMMAND` of the set.
        skip: positions in the set's order.
        first_sample: samples in the sets before this one, in a mixture.
    """

    def __init__(
        self,
        config: DataConfig,
        location: str,
        index: ShardIndex,
        seed: int,
        skip: Sequence[range] = (),
        first_sample: int = 0,
    ) -> None:
        self.config = config
        self.index = index
        self.seed = seed
        self.skip = skip
        self.first_sample = first_sample
        self.order = SetOrder(seed, len(index))
        storage = open_storage(location, retries=config.retries, timeout=config.timeout, pipe=config.pipe)
        if config.cache is not None and not isinstance(storage, LocalStorage):
            storage = CachedStorage(storage, config.cache, index.shards)
        self.storage = storage

    def crop_at(self, position: int, image: int | None = None) -> Crop:
        """The crop at a position of the set's order, for the global image index `image`.

        Raises `UserError` if neither its sample nor any replacement can be read, and at once for mistakes that affect
        every sample.
        """
        image = position if image is None else image
        size = len(self.index)
        corrupt: dict[int, CorruptSample] = {}
        candidates = (each for each in count(position, size) if not any(each in span for span in self.skip))
        for candidate in islice(candidates, ATTEMPTS):
            sample = self.order.sample_at(candidate)
            if sample in corrupt:
                continue
            crop, flip, epoch = self.config.crop, self.config.flip, candidate // size
            try:
                encoded = EncodedImage(self.stored(sample))
                downscale = self.config.downscale if encoded.is_jpeg else 1.0
                square, upscaled = cut(
                    encoded, crop, flip, seed=self.seed, epoch=epoch, sample=sample, downscale=downscale
                )
            except (OSError, ValueError) as error:
                corrupt[sample] = CorruptSample(self.first_sample + sample, self._reason(sample, error))
                continue
            pixels = torch.from_numpy(to_array(square))
            return Crop(image, self.index.keys[sample], pixels, upscaled, list(corrupt.values()))
        *_, last = corrupt.values()
        raise UserError(
            "all-samples-corrupt",
            "data.shards",
            f"none of the {len(corrupt)} samples tried for global image {image} can be read (the last: "
            f"{last.reason}); restore the shards (`hpcm shards verify` lists all damage)",
        )

    def stored(self, sample: int) -> bytes:
        """The stored image file of a sample; damaged bytes are read once more, from a renewed handle or cache.

        Raises `OSError` or `Damaged`.
        """
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
            reason = str(error)
        elif isinstance(error, Unreadable):
            reason = f"cannot be read {error}"
        elif isinstance(error, FileNotFoundError):
            reason = "cannot be read: the shard is missing"
        elif isinstance(error, OSError):
            reason = f"cannot be read: {error.strerror or error}"
        else:
            reason = f"cannot be decoded: {error}"
        return f"sample {self.index.keys[sample]} in {place} {reason}"


class MixtureReader:
    """Reads and crops the samples of all sets of a mixture. Close it after use.

    A corrupt sample is replaced by one of its own set, as in `SampleReader`. `skip`: global image indices.
    """

    def __init__(self, config: DataConfig, mixture: Mixture, seed: int, skip: Sequence[range] = ()) -> None:
        self.order = MixtureOrder(seed, mixture.shares)
        spans = [(self.order.positions_before(span.start), self.order.positions_before(span.stop)) for span in skip]
        first_samples = accumulate((len(index) for index in mixture.indices), initial=0)
        self.sets = [
            SampleReader(
                config,
                location,
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
        """The crop of the global image index `image`. Raises as `SampleReader.crop_at`."""
        number, position = self.order.position_at(image)
        return self.sets[number].crop_at(position, image)

    def close(self) -> None:
        """Close files and connections."""
        for reader in self.sets:
            reader.close()
