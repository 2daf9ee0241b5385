"""Commands: `hpcm encode` (images to `.hpcm` files) and `hpcm decode` (`.hpcm` files to PNG)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hpcm_scale.config.schema import RateConfig
from hpcm_scale.errors import Parser, UserError, entry_point
from hpcm_scale.limits import QUALITY, Range


@entry_point
def encode() -> None:
    """Entry point of `hpcm encode`."""
    parser = Parser(
        prog="hpcm encode",
        description="Encode an image (JPEG, PNG or WebP), or every image below a folder, to .hpcm files. Images are "
        "rotated upright and converted to 8-bit RGB; of 16-bit samples the high byte is used. Variable-rate weights "
        "encode at a quality, by default that of λ = model.rate.reference, or search for the one of a rate or a PSNR.",
    )
    parser.add_argument("source", help="image, or folder of images")
    parser.add_argument("target", help=".hpcm file, or folder for them")
    parser.add_argument("--weights", required=True, help="weights.safetensors of a run folder; decoding needs the same")
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument(
        "--quality", type=QUALITY.real, metavar="Q", help="from 0, the smallest file, to 100, the best image"
    )
    positive = Range(above=0, most=1000).real
    aim.add_argument("--bpp", type=positive, help="nearest possible bits per pixel of the whole file")
    aim.add_argument("--psnr", type=positive, metavar="DB", help="smallest file that decodes to at least this PSNR")
    parser.add_argument("--background", help="colour behind transparent pixels, for example white or #808080")
    parser.add_argument("--device", help="for example cuda or cpu; default: cuda if there is a GPU")
    arguments = parser.parse_args()
    background = _colour(arguments.background)

    from hpcm_scale.coding.codec import Codec
    from hpcm_scale.coding.files import encode_file, encoding_jobs, run_jobs
    from hpcm_scale.model.variable_rate import quality_of_byte
    from hpcm_scale.model.weights import device_of
    from hpcm_scale.tasks import load_encoder
    from hpcm_scale.tracking.progress import progress

    jobs = encoding_jobs(Path(arguments.source), Path(arguments.target))
    device = device_of(arguments.device)
    encoder = load_encoder(arguments.weights)
    encoder.module.to(device)
    model = encoder.codec
    choose = _chooser(arguments, model.config.rate)
    codec = Codec(model, edit=encoder.edit)
    work = partial(encode_file, codec, choose=choose, background=background)
    results = run_jobs(jobs, work, partial(progress, description="encoding", unit="image"))
    size = sum(result.size for result in results)
    bpp = 8 * size / sum(result.pixels for result in results)
    images = arguments.source if len(jobs) == 1 else f"{len(jobs)} images of {arguments.source}"
    parts = [f"{images}: {size:,} bytes", f"{bpp:.4f} bits per pixel"]
    if model.config.rate.levels > 1:
        levels = [result.level for result in results if result.level is not None]
        parts.append(f"quality {_span([*map(quality_of_byte, levels)], 'g')}")
    if arguments.psnr is not None:
        psnrs = [result.psnr for result in results if result.psnr is not None]
        parts.append(f"PSNR {_span(psnrs, '.2f')} dB")
    print(f"{', '.join(parts)}, in {arguments.target}")


def _chooser(arguments: Namespace, rate: RateConfig) -> Callable:
    """The `Choose` of the options. Raises UserError if fixed-rate weights are given a quality, bpp or PSNR."""
    from hpcm_scale.coding.files import at_level, nearest_to_rate, smallest_with_psnr
    from hpcm_scale.model.variable_rate import byte_of_quality, default_byte

    aims = [name for name in ("quality", "bpp", "psnr") if getattr(arguments, name) is not None]
    if rate.levels == 1:
        if aims:
            raise UserError(
                "fixed-rate-weights",
                f"--{aims[0]}",
                f"{arguments.weights} has one rate, that of the λ it was trained for; omit --{aims[0]}, or give "
                "variable-rate weights (trained with model.rate.levels above 1)",
            )
        return partial(at_level, level=None)
    if arguments.bpp is not None:
        return partial(nearest_to_rate, bpp=arguments.bpp)
    if arguments.psnr is not None:
        return partial(smallest_with_psnr, psnr=arguments.psnr)
    level = default_byte(rate) if arguments.quality is None else byte_of_quality(arguments.quality)
    return partial(at_level, level=level)


def _span(values: list[float], form: str) -> str:
    """The common value of all images, or the lowest and the highest."""
    return " to ".join(dict.fromkeys(f"{end(values):{form}}" for end in (min, max)))


def _colour(name: str | None) -> tuple[int, int, int] | None:
    from PIL import ImageColor

    try:
        return None if name is None else ImageColor.getrgb(name)[:3]
    except ValueError as error:
        raise UserError(
            "unknown-colour", "--background", f"--background {name} is not a colour; try white, black or #808080"
        ) from error


@entry_point
def decode() -> None:
    """Entry point of `hpcm decode`."""
    parser = Parser(
        prog="hpcm decode",
        description="Decode an .hpcm file, or every one below a folder, to 8-bit RGB PNG.",
    )
    parser.add_argument("source", help=".hpcm file, or folder of them")
    parser.add_argument("target", help="PNG file, or folder for them")
    parser.add_argument("--weights", required=True, help="the weights that the file was encoded with")
    parser.add_argument("--device", help="for example cuda or cpu; default: cuda if there is a GPU")
    arguments = parser.parse_args()

    from hpcm_scale.coding.codec import Codec
    from hpcm_scale.coding.files import decode_file, decoding_jobs, run_jobs
    from hpcm_scale.model.weights import device_of, load_weights
    from hpcm_scale.tracking.progress import progress

    jobs = decoding_jobs(Path(arguments.source), Path(arguments.target))
    device = device_of(arguments.device)
    model, _ = load_weights(arguments.weights)
    work = partial(decode_file, Codec(model.to(device)))
    run_jobs(jobs, work, partial(progress, description="decoding", unit="file"))
    files = arguments.source if len(jobs) == 1 else f"{len(jobs)} files of {arguments.source}"
    print(f"{files}: decoded to {arguments.target}")
