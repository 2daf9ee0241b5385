"""Photos and `.hpcm` files on disk, one or a folder of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from hpcm_scale.coding.codec import Codec
from hpcm_scale.coding.rate_search import Choice
from hpcm_scale.data.image_set import read_image
from hpcm_scale.data.images import Colour, TransparentImage
from hpcm_scale.data.sources import check_file, choose_files, image_files
from hpcm_scale.errors import UserError
from hpcm_scale.files import check_length, read_file, whole_file, writing

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
