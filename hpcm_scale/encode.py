"""Command: photos to `.hpcm` files."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hpcm_scale.errors import Parser, UserError, one_line


@one_line
def main() -> None:
    """Entry point of `hpcm encode` and `python -m hpcm_scale.encode`."""
    parser = Parser(
        prog="hpcm encode",
        description="Code a photo (JPEG, PNG or WebP; a folder of them: every one below it) into an .hpcm file. "
        "Photos are turned upright and become 8-bit RGB; of 16-bit samples the high byte is kept.",
    )
    parser.add_argument("source", help="photo, or folder of photos")
    parser.add_argument("target", help=".hpcm file to write, or folder for them")
    parser.add_argument("--weights", required=True, help="a run folder's weights.safetensors; decoding needs the same")
    parser.add_argument("--background", help="colour behind transparent pixels, for example white or #808080")
    parser.add_argument("--device", help="for example cuda or cpu; default: cuda where there is one")
    arguments = parser.parse_args()
    background = _colour(arguments.background)

    from hpcm_scale.coding.codec import Codec
    from hpcm_scale.coding.files import encode_file, encoding_jobs, run_jobs
    from hpcm_scale.model.weights import device_of, load_weights
    from hpcm_scale.tracking.progress import progress

    jobs = encoding_jobs(Path(arguments.source), Path(arguments.target))
    device = device_of(arguments.device)
    model, _ = load_weights(arguments.weights)
    work = partial(encode_file, Codec(model.to(device)), background=background)
    results = run_jobs(jobs, work, partial(progress, description="encoding", unit="photo"))
    size = sum(size for size, _ in results)
    bpp = 8 * size / sum(pixels for _, pixels in results)
    photos = arguments.source if len(jobs) == 1 else f"{len(jobs)} photos of {arguments.source}"
    print(f"{photos}: {size:,} bytes, {bpp:.4f} bits per pixel, in {arguments.target}")


def _colour(name: str | None) -> tuple[int, int, int] | None:
    from PIL import ImageColor

    try:
        return None if name is None else ImageColor.getrgb(name)[:3]
    except ValueError as error:
        raise UserError(f"--background {name} is no colour; try white, black or #808080") from error


if __name__ == "__main__":
    main()
