"""Command: photos to `.hpcm` files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from hpcm_scale.errors import Parser, UserError, one_line
from hpcm_scale.limits import QUALITY, Range


@one_line
def main() -> None:
    """Entry point of `hpcm encode` and `python -m hpcm_scale.commands.encode`."""
    parser = Parser(
        prog="hpcm encode",
        description="Code a photo (JPEG, PNG or WebP; a folder of them: every one below it) into an .hpcm file. "
        "Photos are turned upright and become 8-bit RGB; of 16-bit samples the high byte is kept. Variable-rate "
        "weights code every photo at a quality, by default that of the λ they started from (model.rate.reference), or "
        "look for the one with a rate or a PSNR.",
    )
    parser.add_argument("source", help="photo, or folder of photos")
    parser.add_argument("target", help=".hpcm file to write, or folder for them")
    parser.add_argument("--weights", required=True, help="a run folder's weights.safetensors; decoding needs the same")
    aim = parser.add_mutually_exclusive_group()
    aim.add_argument(
        "--quality", type=QUALITY.real, metavar="Q", help="from 0, the smallest file, to 100, the best picture"
    )
    positive = Range(above=0, most=1000).real
    aim.add_argument("--bpp", type=positive, help="bits per pixel of the whole file, as near as can be had")
    aim.add_argument("--psnr", type=positive, metavar="DB", help="the smallest file that decodes to at least this PSNR")
    parser.add_argument("--background", help="colour behind transparent pixels, for example white or #808080")
    parser.add_argument("--device", help="for example cuda or cpu; default: cuda where there is one")
    arguments = parser.parse_args()
    background = _colour(arguments.background)

    from hpcm_scale.coding.codec import Codec
    from hpcm_scale.coding.files import encode_file, encoding_jobs, run_jobs
    from hpcm_scale.machine.codec import edit_of, load_machine_codec
    from hpcm_scale.model.variable_rate import quality_of_byte
    from hpcm_scale.model.weights import device_of
    from hpcm_scale.tracking.progress import progress

    jobs = encoding_jobs(Path(arguments.source), Path(arguments.target))
    device = device_of(arguments.device)
    machine_codec = load_machine_codec(arguments.weights).to(device)
    model = machine_codec.codec
    choose = _chooser(arguments, model.config.rate)
    codec = Codec(model, edit=edit_of(machine_codec))
    work = partial(encode_file, codec, choose=choose, background=background)
    results = run_jobs(jobs, work, partial(progress, description="encoding", unit="photo"))
    size = sum(result.size for result in results)
    bpp = 8 * size / sum(result.pixels for result in results)
    photos = arguments.source if len(jobs) == 1 else f"{len(jobs)} photos of {arguments.source}"
    told = [f"{photos}: {size:,} bytes", f"{bpp:.4f} bits per pixel"]
    if model.config.rate.levels > 1:
        told.append(f"quality {_span([quality_of_byte(result.level) for result in results], 'g')}")
    if arguments.psnr is not None:
        told.append(f"PSNR {_span([result.psnr for result in results], '.2f')} dB")
    print(f"{', '.join(told)}, in {arguments.target}")


def _chooser(arguments, rate) -> Callable:
    """How the file of every photo is chosen. Raises UserError if weights of fixed rate are given an aim."""
    from hpcm_scale.coding.files import at_level, nearest_to_rate, smallest_with_psnr
    from hpcm_scale.model.variable_rate import byte_of_quality, usual_byte

    aims = [name for name in ("quality", "bpp", "psnr") if getattr(arguments, name) is not None]
    if rate.levels == 1:
        if aims:
            raise UserError(
                f"{arguments.weights} has one rate, that of the λ it was trained for; leave out --{aims[0]}, or name "
                "weights of a variable-rate model (training with model.rate.levels above 1)"
            )
        return partial(at_level, level=None)
    if arguments.bpp is not None:
        return partial(nearest_to_rate, bpp=arguments.bpp)
    if arguments.psnr is not None:
        return partial(smallest_with_psnr, psnr=arguments.psnr)
    level = usual_byte(rate) if arguments.quality is None else byte_of_quality(arguments.quality)
    return partial(at_level, level=level)


def _span(values: list[float], form: str) -> str:
    """A value that all photos share, or the lowest and the highest."""
    return " to ".join(dict.fromkeys(f"{end(values):{form}}" for end in (min, max)))


def _colour(name: str | None) -> tuple[int, int, int] | None:
    from PIL import ImageColor

    try:
        return None if name is None else ImageColor.getrgb(name)[:3]
    except ValueError as error:
        raise UserError(f"--background {name} is no colour; try white, black or #808080") from error


if __name__ == "__main__":
    main()
