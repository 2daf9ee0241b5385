"""Photos and `.hpcm` files on disk, one or a folder of them."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from hpcm_scale.coding.codec import Codec
from hpcm_scale.data.images import Colour, TransparentImage
from hpcm_scale.data.sources import check_file, choose_files, image_files, read_image
from hpcm_scale.errors import UserError
from hpcm_scale.files import check_length, read_file, whole_file, writing
from hpcm_scale.model.variable_rate import LARGEST_BYTE

# How far a decoded image is off.


def peak_signal_to_noise(x: Tensor, y: Tensor) -> float:
    """PSNR in dB of two uint8 images; that of one wrong level in one value for identical ones."""
    errors = (x.to(torch.int32) - y.to(torch.int32)).square().sum(dtype=torch.int64).item()
    return 10 * math.log10(255**2 * x.numel() / max(errors, 1))


# The level of a variable-rate model for a rate or a PSNR, found by making files.
#
# Both rise with the level, but for small ripples: bisection finds where a target is crossed, and the levels around that
# place are looked at, too.


AROUND = 2
"""Levels on each side of the crossing that are tried."""


class Choice(NamedTuple):
    """An image's file, and the level it was made at."""

    data: bytes
    level: int | None
    """None at fixed rate."""
    psnr: float | None = None
    """dB, of 8-bit pixels; None where it was not asked for."""


def at_level(codec: Codec, pixels: Tensor, level: int | None) -> Choice:
    """The file of an image, uint8 (3, H, W), at a level from 0 to 255, at fixed rate None. Raises as `Codec` does."""
    return Choice(codec.compress(pixels, level), level)


def nearest_to_rate(codec: Codec, pixels: Tensor, bpp: float) -> Choice:
    """The file whose bits per pixel, header included, are nearest to `bpp`; of equals that of the lower level.

    Raises UserError, telling the range, if it lies outside of what the image can be coded at.
    """
    encode, area = codec.encoder(pixels), pixels[0].numel()
    file = cache(lambda level: encode(level).data)

    def rate(level: int) -> float:
        return 8 * len(file(level)) / area

    lowest, highest = rate(0), rate(LARGEST_BYTE)
    if not lowest <= bpp <= highest:
        raise UserError(f"{bpp:g} bpp is out of range for this image; choose {_between(lowest, highest)} bpp")
    level = min(_around(rate, bpp), key=lambda level: abs(rate(level) - bpp))
    return Choice(file(level), level)


def smallest_with_psnr(codec: Codec, pixels: Tensor, psnr: float) -> Choice:
    """The smallest file that decodes to at least this PSNR in dB; of equals the one that decodes best.

    Raises UserError, telling the range, if no level reaches it.
    """
    encode = codec.encoder(pixels)

    @cache
    def choice(level: int) -> Choice:
        data, y_hat, _ = encode(level)
        return Choice(data, level, peak_signal_to_noise(pixels, codec.picture(y_hat, *pixels.shape[1:])))

    def quality(level: int) -> float:
        return choice(level).psnr

    highest = quality(LARGEST_BYTE)
    if highest < psnr:
        raise UserError(f"{psnr:g} dB is out of reach for this image; choose {_between(quality(0), highest)} dB")
    enough = [choice(level) for level in _around(quality, psnr) if quality(level) >= psnr]
    return min(enough, key=lambda choice: (len(choice.data), -choice.psnr))


def _around(value: Callable[[int], float], target: float) -> range:
    """The first level whose value is the target or more, and its neighbours."""
    first = bisect_left(range(LARGEST_BYTE), target, key=value)
    return range(max(first - AROUND, 0), min(first + AROUND, LARGEST_BYTE) + 1)


def _between(low: float, high: float) -> str:
    """In words, with four digits, rounded so that both ends can be had."""
    low, high = (
        Context(prec=4, rounding=rounding).create_decimal_from_float(value)
        for value, rounding in ((low, ROUND_CEILING), (high, ROUND_FLOOR))
    )
    return f"between {low:f} and {high:f}"


SUFFIX = ".hpcm"
PICTURE_SUFFIX = ".png"


class Written(NamedTuple):
    """What became of a file."""

    size: int
    """Bytes of the `.hpcm` file."""
    pixels: int
    level: int | None = None
    """It was encoded at, 0 to 255; None at fixed rate."""
    psnr: float | None = None
    """dB, where the encoder looked."""


Choose = Callable[[Codec, Tensor], Choice]
"""The file of an image, uint8 (3, H, W): one of `rate_search`, its aim filled in."""


def encode_file(
    codec: Codec, source: Path, target: Path, *, choose: Choose, background: Colour | None = None
) -> Written:
    """Code a JPEG, PNG or WebP photo by the rule of `data.images.to_rgb`.

    A transparent photo is laid over `background`; without one it is refused. Raises UserError, naming the file.
    """
    try:
        pixels = read_image(source, background)
    except TransparentImage as error:
        mend = "choose what is behind them with --background"
        raise UserError(f"{source}: {error}, which no .hpcm file keeps; {mend}") from error
    data, level, psnr = _naming(source, partial(choose, codec), pixels)
    with writing(target), whole_file(target) as unfinished:
        unfinished.write_bytes(data)
    return Written(len(data), pixels[0].numel(), level, psnr)


def decode_file(codec: Codec, source: Path, target: Path) -> Written:
    """Decode a `.hpcm` file to a PNG. Raises UserError, naming the file."""
    try:
        data = read_file(source)
    except OSError as error:
        raise UserError(f"cannot read {source} ({error.strerror}); mend its permissions") from error
    pixels = _naming(source, codec.decompress, data)
    with writing(target), whole_file(target) as unfinished:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(unfinished, format="PNG")
    return Written(len(data), pixels[0].numel())


def encoding_jobs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """(image, .hpcm file) for one image, or for every one below a folder (`sources.image_files`), in order of name.

    Raises UserError where there is nothing to do, where a folder's file would overwrite one, and where a name is too
    long.
    """
    return _jobs(source, target, image_files, SUFFIX)


def decoding_jobs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """(.hpcm file, PNG) for one file, or for every one below a folder, as `encoding_jobs` does."""

    def coded(folder: Path) -> list[Path]:
        return choose_files(folder, lambda path: path.suffix.lower() == SUFFIX, f"{SUFFIX} file")

    return _jobs(source, target, coded, PICTURE_SUFFIX)


def run_jobs(
    jobs: Sequence[tuple[Path, Path]],
    work: Callable[[Path, Path], Written],
    progress: Callable[[Iterable[tuple[Path, Path]]], Iterable[tuple[Path, Path]]],
) -> list[Written]:
    """Do all jobs; what `work` returned for each. Raises UserError at the end if any failed, naming them."""
    results, failures = [], []
    for source, target in progress(jobs):
        try:
            results.append(work(source, target))
        except UserError as error:  # noqa: PERF203 (one bad file must not stop the others)
            failures.append(str(error))
    if failures and len(jobs) > 1:
        raise UserError(f"{len(failures)} of {len(jobs)} files failed, the others are done: {'; '.join(failures)}")
    if failures:
        raise UserError(failures[0])
    return results


def _jobs(source: Path, target: Path, files_of: Callable[[Path], list[Path]], suffix: str) -> list[tuple[Path, Path]]:
    if not source.is_dir():
        check_file(source)
        if target.is_dir():
            raise UserError(f"{target} is a folder; name the {suffix} file to write")
        if target.suffix.lower() != suffix:
            raise UserError(f"what is written is a {suffix} file; name it so instead of {target.name}")
        check_length(target)
        return [(source, target)]
    if os.path.lexists(target) and not target.is_dir():
        kind = "a file" if target.exists() else "a link to nothing"
        raise UserError(f"{source} is a folder and {target} {kind}; name a folder to write to")
    jobs: dict[Path, Path] = {}
    for path in files_of(source):
        written = target / path.relative_to(source).with_suffix(suffix)
        if written in jobs:
            raise UserError(f"{jobs[written]} and {path} would both become {written}; rename one of them")
        check_length(written)
        jobs[written] = path
    there = [written for written in jobs if written.exists()]
    if there:
        also = f" and {len(there) - 1} more" if there[1:] else ""
        raise UserError(f"{there[0]}{also} would be overwritten; name a new folder, or remove them")
    return [(path, written) for written, path in jobs.items()]


def _naming(source: Path, work: Callable, argument):
    """`work(argument)`, with the file's name before what went wrong."""
    try:
        return work(argument)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
