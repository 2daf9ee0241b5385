"""Encode and decode files, one or a folder of them; search for the level of a rate or a PSNR."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor

from hpcm_scale.coding.codec import Codec
from hpcm_scale.data.images import Colour, TransparentImage
from hpcm_scale.data.sources import check_file, choose_files, image_files, read_image
from hpcm_scale.errors import UserError
from hpcm_scale.files import atomic_file, check_length, read_file, writing
from hpcm_scale.model.variable_rate import LARGEST_BYTE

T = TypeVar("T")


def peak_signal_to_noise(x: Tensor, y: Tensor) -> float:
    """PSNR in dB of two uint8 images; identical ones have that of an error of 1 in one value."""
    errors = (x.to(torch.int32) - y.to(torch.int32)).square().sum(dtype=torch.int64).item()
    return 10 * math.log10(255**2 * x.numel() / max(errors, 1))


# Search for the level of a rate or a PSNR: both increase with the level except for small ripples, so bisection finds
# where a target is crossed, and the levels around it are tried as well.

AROUND = 2
"""Levels on each side of the crossing that are tried."""


class Choice(NamedTuple):
    """An encoded image and its level."""

    data: bytes
    level: int | None
    """None at fixed rate."""
    psnr: float | None = None
    """dB, of 8-bit pixels; None if it was not computed."""


def at_level(codec: Codec, pixels: Tensor, level: int | None) -> Choice:
    """Encode an image, uint8 (3, H, W), at a level from 0 to 255; None at fixed rate. Raises as `Codec` does."""
    return Choice(codec.compress(pixels, level), level)


def nearest_to_rate(codec: Codec, pixels: Tensor, bpp: float) -> Choice:
    """Encode an image at the level whose bits per pixel, header included, are nearest to `bpp`; the lower of two.

    Raises UserError with the range of the image if `bpp` is outside it.
    """
    encode, area = codec.encoder(pixels), pixels[0].numel()
    file = cache(lambda level: encode(level).data)

    def rate(level: int) -> float:
        return 8 * len(file(level)) / area

    lowest, highest = rate(0), rate(LARGEST_BYTE)
    if not lowest <= bpp <= highest:
        raise UserError(
            "bpp-out-of-range",
            "--bpp",
            f"{bpp:g} bpp is out of range for this image; choose {_between(lowest, highest)} bpp",
        )
    level = min(_around(rate, bpp), key=lambda level: abs(rate(level) - bpp))
    return Choice(file(level), level)


def smallest_with_psnr(codec: Codec, pixels: Tensor, psnr: float) -> Choice:
    """The smallest file with at least this PSNR in dB; of equal sizes, the one with the highest PSNR.

    Raises UserError with the range of the image if no level reaches it.
    """
    encode = codec.encoder(pixels)

    @cache
    def coded(level: int) -> tuple[bytes, float]:
        data, y_hat, _ = encode(level)
        return data, peak_signal_to_noise(pixels, codec.reconstruct(y_hat, *pixels.shape[1:]))

    def quality(level: int) -> float:
        return coded(level)[1]

    highest = quality(LARGEST_BYTE)
    if highest < psnr:
        raise UserError(
            "psnr-out-of-range",
            "--psnr",
            f"{psnr:g} dB is out of range for this image; choose {_between(quality(0), highest)} dB",
        )
    enough = [(level, *coded(level)) for level in _around(quality, psnr) if quality(level) >= psnr]
    level, data, reached = min(enough, key=lambda each: (len(each[1]), -each[2]))
    return Choice(data, level, reached)


def _around(value: Callable[[int], float], target: float) -> range:
    """The first level whose value is at least the target, and its neighbours."""
    first = bisect_left(range(LARGEST_BYTE), target, key=value)
    return range(max(first - AROUND, 0), min(first + AROUND, LARGEST_BYTE) + 1)


def _between(low: float, high: float) -> str:
    """A range with four digits, rounded inwards."""
    lowest, highest = (
        Context(prec=4, rounding=rounding).create_decimal_from_float(value)
        for value, rounding in ((low, ROUND_CEILING), (high, ROUND_FLOOR))
    )
    return f"between {lowest:f} and {highest:f}"


# Files and folders.

SUFFIX = ".hpcm"
IMAGE_SUFFIX = ".png"


class Result(NamedTuple):
    """The result for one file."""

    size: int
    """Bytes of the `.hpcm` file."""
    pixels: int
    level: int | None = None
    """0 to 255; None when decoding, and at fixed rate."""
    psnr: float | None = None
    """dB; None if it was not computed."""


Choose = Callable[[Codec, Tensor], Choice]
"""Encodes an image, uint8 (3, H, W): one of the functions above with its target."""


def encode_file(
    codec: Codec, source: Path, target: Path, *, choose: Choose, background: Colour | None = None
) -> Result:
    """Encode a JPEG, PNG or WebP image, converted by `data.images.to_rgb`, to a `.hpcm` file.

    A transparent image is composited over `background`. Raises UserError that names the file, also for a transparent
    image without a background.
    """
    try:
        pixels = read_image(source, background)
    except TransparentImage as error:
        raise UserError(
            "transparent-image",
            "--background",
            f"{source}: {error}, which .hpcm files do not store; choose their background with --background",
        ) from error
    data, level, psnr = _naming(source, partial(choose, codec, pixels))
    with writing(target), atomic_file(target) as unfinished:
        unfinished.write_bytes(data)
    return Result(len(data), pixels[0].numel(), level, psnr)


def decode_file(codec: Codec, source: Path, target: Path) -> Result:
    """Decode a `.hpcm` file to a PNG. Raises UserError that names the file."""
    try:
        data = read_file(source)
    except OSError as error:
        raise UserError(
            "unreadable-file", "", f"cannot read {source} ({error.strerror}); check its permissions"
        ) from error
    pixels = _naming(source, partial(codec.decompress, data))
    with writing(target), atomic_file(target) as unfinished:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(unfinished, format="PNG")
    return Result(len(data), pixels[0].numel())


def encoding_jobs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """(image, .hpcm file) for one image, or all images below a folder (`sources.image_files`), sorted by name.

    Raises UserError if there is no image, a file of a folder would be overwritten, or a name is too long.
    """
    return _jobs(source, target, image_files, SUFFIX)


def decoding_jobs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """(.hpcm file, PNG) for one file, or all files below a folder. Raises UserError as `encoding_jobs` does."""

    def encoded(folder: Path) -> list[Path]:
        return choose_files(folder, lambda path: path.suffix.lower() == SUFFIX, f"{SUFFIX} file")

    return _jobs(source, target, encoded, IMAGE_SUFFIX)


def run_jobs(
    jobs: Sequence[tuple[Path, Path]],
    work: Callable[[Path, Path], Result],
    progress: Callable[[Iterable[tuple[Path, Path]]], Iterable[tuple[Path, Path]]],
) -> list[Result]:
    """Run `work` for all jobs. Raises UserError at the end that names all jobs that failed."""
    results, failures = [], []
    for source, target in progress(jobs):
        try:
            results.append(work(source, target))
        except UserError as error:  # noqa: PERF203 (one bad file must not stop the others)
            if len(jobs) == 1:
                raise
            failures.append(str(error))
    if failures:
        raise UserError(
            "failed-files",
            "",
            f"{len(failures)} of {len(jobs)} files failed ({'; '.join(failures)}); correct the causes and repeat the "
            "command for them, the others are written",
        )
    return results


def _jobs(source: Path, target: Path, files_of: Callable[[Path], list[Path]], suffix: str) -> list[tuple[Path, Path]]:
    if not source.is_dir():
        check_file(source)
        if target.is_dir():
            raise UserError("target-is-folder", "", f"{target} is a folder; give the {suffix} file to write")
        if target.suffix.lower() != suffix:
            raise UserError(
                "target-suffix", "", f"{target.name} does not have the suffix {suffix}; give the {suffix} file to write"
            )
        check_length(target)
        return [(source, target)]
    if os.path.lexists(target) and not target.is_dir():
        kind = "a file" if target.exists() else "a dangling link"
        raise UserError("target-is-file", "", f"{source} is a folder and {target} is {kind}; give a folder to write to")
    jobs: dict[Path, Path] = {}
    for path in files_of(source):
        written = target / path.relative_to(source).with_suffix(suffix)
        if written in jobs:
            raise UserError(
                "same-target", "", f"{jobs[written]} and {path} would both be written to {written}; rename one of them"
            )
        check_length(written)
        jobs[written] = path
    existing = [written for written in jobs if written.exists()]
    if existing:
        also = f" and {len(existing) - 1} more" if existing[1:] else ""
        raise UserError(
            "overwritten-files", "", f"{existing[0]}{also} would be overwritten; choose a new folder, or remove them"
        )
    return [(path, written) for written, path in jobs.items()]


def _naming(source: Path, work: Callable[[], T]) -> T:
    """`work()`; errors begin with the name of the file."""
    try:
        return work()
    except UserError as error:
        raise UserError(error.code, error.key, f"{source}: {error}") from error
