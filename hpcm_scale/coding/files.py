"""Photos and `.hpcm` files on disk, one or a folder of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from hpcm_scale.coding.codec import Codec
from hpcm_scale.coding.rate_search import Choice
from hpcm_scale.data.image_set import read_image
from hpcm_scale.data.images import EXTENSIONS, Colour, TransparentImage
from hpcm_scale.data.sources import files_below
from hpcm_scale.errors import UserError
from hpcm_scale.files import whole_file, writing

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
        data = source.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {source} ({error.strerror}); mend its permissions") from error
    pixels = _naming(source, codec.decompress, data)
    with writing(target), whole_file(target) as unfinished:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(unfinished, format="PNG")
    return Written(len(data), pixels[0].numel())


def encoding_jobs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """(photo, .hpcm file) for one photo, or for every one below a folder, in order of name.

    Raises UserError where there is nothing to do, and where a folder's file would overwrite one.
    """
    return _jobs(source, target, {f".{extension}" for extension in EXTENSIONS}, SUFFIX, "JPEG, PNG or WebP photo")


def decoding_jobs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """(.hpcm file, PNG) for one file, or for every one below a folder, as `encoding_jobs` does."""
    return _jobs(source, target, {SUFFIX}, PICTURE_SUFFIX, f"{SUFFIX} file")


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


def _jobs(source: Path, target: Path, wanted: set[str], suffix: str, kind: str) -> list[tuple[Path, Path]]:
    if source.is_file():
        if target.is_dir():
            raise UserError(f"{target} is a folder; name the {suffix} file to write")
        if target.suffix.lower() != suffix:
            raise UserError(f"what is written is a {suffix} file; name it so instead of {target.name}")
        return [(source, target)]
    if not source.is_dir():
        raise UserError(f"there is no file or folder {source}; check the path")
    if target.exists() and not target.is_dir():
        raise UserError(f"{source} is a folder and {target} a file; name a folder to write to")
    sources = sorted(path for path in files_below(source) if path.suffix.lower() in wanted)
    if not sources:
        raise UserError(f"there is no {kind} in {source}; name a folder that holds some")
    jobs: dict[Path, Path] = {}
    for path in sources:
        written = target / path.relative_to(source).with_suffix(suffix)
        if written in jobs:
            raise UserError(f"{jobs[written]} and {path} would both become {written}; rename one of them")
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
