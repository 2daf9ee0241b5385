"""A thousand or ten thousand ways to damage honest files, and what comes of each; run in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from seeded_models import spread_nano
from torch import Tensor

from hpcm_scale.coding.codec import Codec
from hpcm_scale.coding.container import HEADER_BYTES, Container, pack, unpack
from hpcm_scale.entropy.range_coder import LARGEST_SYMBOL, SymbolWriter
from hpcm_scale.errors import UserError

Random = np.random.Generator
Files = list[bytes]
"""The file to damage, then others."""

SEEDS = (3, 4)
"""Of the models."""
LEVELS = (None, 77)
"""Of the two images' files."""


@dataclass
class Outcomes:
    """What came of all mutations."""

    counts: Counter = field(default_factory=Counter)
    """By (kind, outcome)."""
    wrong: list[str] = field(default_factory=list)
    """What should not have happened."""
    slowest: float = 0.0
    """CPU seconds that one file took at most."""
    honest_slowest: float = 0.0
    """The same of files that nobody has changed."""
    honest_bytes: int = 0
    """What memory grew by in honest decodes."""
    hostile_bytes: int = 0
    """What it grew by from the same start when all mutations were done, at its peak."""


# Damage from outside: nobody mends the checksums.


def flipped(random: Random, files: Files) -> bytes:
    """A few bytes anywhere have other values."""
    data = bytearray(files[0])
    for place in random.integers(0, len(data), random.integers(1, 9)):
        data[place] ^= int(random.integers(1, 256))
    return bytes(data)


def flipped_in_header(random: Random, files: Files) -> bytes:
    header, streams = _halves(files[0])
    return flipped(random, [header]) + streams


def truncated(random: Random, files: Files) -> bytes:
    return files[0][: random.integers(0, len(files[0]))]


def extended(random: Random, files: Files) -> bytes:
    return files[0] + random.bytes(random.integers(1, 100))


def cut_out(random: Random, files: Files) -> bytes:
    """Bytes are missing from the middle, as when a transfer loses a packet."""
    start, stop = sorted(random.integers(0, len(files[0]) + 1, 2))
    return files[0][:start] + files[0][stop:]


def other_lengths(random: Random, files: Files) -> bytes:
    """The header tells other lengths of the streams."""
    data = bytearray(files[0])
    place = 22 if random.integers(2) else 30
    length = int.from_bytes(data[place : place + 4], "little")
    new = int(random.choice([0, 1, length // 2, length - 4, length + 4, 2 * length, 2**31 - 1, 2**32 - 1]))
    data[place : place + 4] = new.to_bytes(4, "little")
    return bytes(data)


def swapped_headers(random: Random, files: Files) -> bytes:
    return _halves(_any(random, files[1:]))[0] + _halves(files[0])[1]


def swapped_streams(random: Random, files: Files) -> bytes:
    content = unpack(files[0])
    return _halves(files[0])[0] + content.y + content.z


def noise(random: Random, files: Files) -> bytes:
    """Bytes that begin as a file does."""
    return files[0][: random.integers(0, HEADER_BYTES)] + random.bytes(random.integers(0, 500))


# Damage by one who knows the format: all checksums of bytes are right, and the decoder meets the garbage.


def z_flipped(random: Random, content: Container, others: list[Container]) -> Container:
    return replace(content, z=flipped(random, [content.z]))


def y_flipped(random: Random, content: Container, others: list[Container]) -> Container:
    return replace(content, y=flipped(random, [content.y]))


def y_start_flipped(random: Random, content: Container, others: list[Container]) -> Container:
    """Where the shifts' block size and probabilities are."""
    return replace(content, y=random.bytes(4) + content.y[4:])


def z_noise(random: Random, content: Container, others: list[Container]) -> Container:
    return replace(content, z=_noise(random, len(content.z)))


def y_noise(random: Random, content: Container, others: list[Container]) -> Container:
    return replace(content, y=_noise(random, len(content.y)))


def all_noise(random: Random, content: Container, others: list[Container]) -> Container:
    return y_noise(random, z_noise(random, content, others), others)


def stream_shortened(random: Random, content: Container, others: list[Container]) -> Container:
    name = _any(random, ["z", "y"])
    stream = getattr(content, name)
    return replace(content, **{name: stream[: random.integers(0, len(stream))]})


def stream_extended(random: Random, content: Container, others: list[Container]) -> Container:
    """The right symbols come before what is too much."""
    name = _any(random, ["z", "y"])
    return replace(content, **{name: getattr(content, name) + random.bytes(4 * random.integers(1, 20))})


def other_stream(random: Random, content: Container, others: list[Container]) -> Container:
    """A stream is another file's, or the other stream of this one."""
    name = _any(random, ["z", "y"])
    return replace(content, **{name: _any(random, [s for other in (content, *others) for s in (other.z, other.y)])})


def huge_symbols(random: Random, content: Container, others: list[Container]) -> Container:
    """z is as far out as can be written, and y's tables follow from it."""
    writer = SymbolWriter()
    count = 16 * 4 * 8
    writer.write(random.choice([-LARGEST_SYMBOL, LARGEST_SYMBOL, 0], count), random.integers(0, 60, count))
    return replace(content, z=writer.bytes, y=_noise(random, len(content.y)))


def absurd_size(random: Random, content: Container, others: list[Container]) -> Container:
    sizes = [(2**14, 2**14), (1, 2**28), (2**28, 1), (2**20, 256), (0, 5), (2**32 - 1, 2**32 - 1), (5000, 7000)]
    width, height = _any(random, sizes)
    return replace(content, width=width, height=height)


def other_size(random: Random, content: Container, others: list[Container]) -> Container:
    width, height = (int(side) for side in random.integers(1, 1200, 2))
    return replace(content, width=width, height=height)


def other_level(random: Random, content: Container, others: list[Container]) -> Container:
    """Or one where weights of fixed rate have none, or none where there must be one."""
    levels = {None, *range(256)} - {content.level}
    return replace(content, level=_any(random, [*levels]))


def other_digest(random: Random, content: Container, others: list[Container]) -> Container:
    return replace(content, digest=random.bytes(8))


def other_symbols_checksum(random: Random, content: Container, others: list[Container]) -> Container:
    return replace(content, symbols_checksum=int(random.integers(2**32)))


SHALLOW: dict[Callable, int] = {
    flipped: 245,
    flipped_in_header: 150,
    truncated: 120,
    extended: 50,
    cut_out: 60,
    other_lengths: 80,
    swapped_headers: 70,
    swapped_streams: 10,
    noise: 80,
}
"""Of a thousand."""
DEEP: dict[Callable, int] = {
    z_flipped: 15,
    y_flipped: 20,
    y_start_flipped: 10,
    z_noise: 8,
    y_noise: 10,
    all_noise: 10,
    stream_shortened: 10,
    stream_extended: 5,
    other_stream: 10,
    huge_symbols: 6,
    absurd_size: 7,
    other_size: 10,
    other_level: 5,
    other_digest: 5,
    other_symbols_checksum: 4,
}
"""Of a thousand, too."""


def run(images: list[Tensor], seed: int, thousands: int) -> Outcomes:
    """All mutations of the files of two images, each (3, H, W), one of fixed and one of variable rate.

    There are files made with other weights, too.
    """
    torch.set_num_threads(1)
    codecs = [Codec(spread_nano(SEEDS[0])), Codec(spread_nano(SEEDS[0], levels=5))]
    files = [codec.compress(image, level) for codec, image, level in zip(codecs, images, LEVELS, strict=True)]
    foreign = [Codec(spread_nano(SEEDS[1])).compress(image) for image in images]
    outcomes = Outcomes()
    random = np.random.default_rng(seed)
    start = _start_of_peak()
    honest = {}
    for codec, data in zip(codecs, files, strict=True):
        began = time.process_time()
        honest[data] = codec.decompress(data)
        outcomes.honest_slowest = max(outcomes.honest_slowest, time.process_time() - began)
    outcomes.honest_bytes = _peak() - start
    for mutation, count in (SHALLOW | DEEP).items():
        for index in range(thousands * count):
            codec, data = codecs[index % len(files)], files[index % len(files)]
            others = [file for file in files + foreign if file != data]
            if mutation in SHALLOW:
                mutated = mutation(random, [data, *others])
            else:
                mutated = pack(mutation(random, unpack(data), [unpack(file) for file in others]))
            began = time.process_time()
            outcome = _decode(codec, mutated, data, honest[data])
            outcomes.slowest = max(outcomes.slowest, time.process_time() - began)
            outcomes.counts[mutation.__name__, outcome] += 1
            if outcome not in ("refused", "right picture", "the same, cut otherwise"):
                outcomes.wrong.append(f"{mutation.__name__} {index}: {outcome}")
    outcomes.hostile_bytes = _peak() - start
    return outcomes


def _decode(codec: Codec, mutated: bytes, data: bytes, honest: Tensor) -> str:
    """In words, what became of a mutated file."""
    try:
        found = codec.decompress(mutated)
    except UserError as error:
        return "refused" if str(error) and "\n" not in str(error) else f"refused without a sentence: {error!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    if torch.equal(found, honest):
        return "right picture"
    content, whole = unpack(mutated), unpack(data)
    # Sizes that are padded alike: as if that had been the photo. Nothing in such a file is damaged.
    if (content.width, content.height) != (whole.width, whole.height):
        expected = codec.reconstruct(codec.decode(whole), content.height, content.width)
        if torch.equal(found, expected):
            return "the same, cut otherwise"
    return "a wrong picture"


def _halves(file: bytes) -> tuple[bytes, bytes]:
    """Its header, and its streams."""
    content = unpack(file)
    header = len(file) - len(content.z) - len(content.y)
    return file[:header], file[header:]


def _noise(random: Random, length: int) -> bytes:
    """Of words that are random, all zero, all one, or bytes of either."""
    kinds = [random.bytes(length), bytes(length), b"\xff" * length, random.choice([0, 255], length).astype(np.uint8)]
    return bytes(_any(random, kinds))


def _any(random: Random, choices: list):
    return choices[random.integers(len(choices))]


def _start_of_peak() -> int:
    """Forget the most memory held so far; the bytes held now.

    What the allocator keeps of what was freed goes back first: a decode that fits into it would seem to take nothing.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """Bytes that this process has held at most, since `_start_of_peak`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
