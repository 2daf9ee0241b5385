"""Command: rate, distortion and times of exported weights on a folder of images, beside other codecs."""

from __future__ import annotations

import os
from pathlib import Path

from hpcm_scale.errors import Parser, UserError, one_line

OUTPUTS = "evaluation.json, images.csv, evaluation.md, rate_distortion.png and visual.png"


@one_line
def main() -> None:
    """Entry point of `hpcm evaluate` and `python -m hpcm_scale.evaluate`."""
    parser = Parser(
        prog="hpcm evaluate",
        description="Compress every image to a real file, decompress it from those bytes, and measure: bits per pixel, "
        "PSNR (mean over images, on pixels rounded to 8 bits), MS-SSIM, seconds. Weights of one architecture, "
        "trained at several λ, make one curve.",
    )
    parser.add_argument("--weights", required=True, nargs="+", help="weights.safetensors of one or more runs")
    parser.add_argument("--images", required=True, help="folder of JPEG, PNG or WebP images")
    parser.add_argument("--out", help=f"folder for {OUTPUTS}")
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="one forward pass instead of a file: bits from the likelihoods, in the precision of the training; faster",
    )
    parser.add_argument("--set", help="refuse the folder unless it is this set: kodak, clic-pro-valid or tecnick")
    parser.add_argument(
        "--against",
        type=lambda names: list(dict.fromkeys(name.strip() for name in names.split(","))),
        default=[],
        metavar="CODEC,…",
        help="other codecs for the same images: any of jpeg, webp, avif, jxl, hevc, vvc",
    )
    parser.add_argument(
        "--visual", type=int, default=3, metavar="N", help="crops in visual.png (default: %(default)s; 0: no picture)"
    )
    parser.add_argument("--limit", type=int, help="use only the first so many images")
    parser.add_argument("--device", help="for example cuda or cpu; default: cuda where there is one")
    arguments = parser.parse_args()
    _refuse(arguments)

    from rich.console import Console

    from hpcm_scale.config.schema import Precision
    from hpcm_scale.data.image_set import ImageSet
    from hpcm_scale.evaluation.curves import model_curve, other_curve, read_weights
    from hpcm_scale.evaluation.image_sets import check_set
    from hpcm_scale.evaluation.other_codecs import other_codec
    from hpcm_scale.evaluation.pictures import Crops
    from hpcm_scale.evaluation.results import Results, machine
    from hpcm_scale.evaluation.tables import console_table
    from hpcm_scale.model.layers import set_arithmetic
    from hpcm_scale.model.weights import device_of
    from hpcm_scale.tracking.progress import progress

    # All that can be refused is refused before the first image is coded.
    images = ImageSet(arguments.images, arguments.limit)
    device = device_of(arguments.device)
    others = [other_codec(name) for name in arguments.against]
    models = read_weights(arguments.weights)
    if arguments.set:
        check_set(arguments.set, images)
    else:
        for index in progress(range(len(images)), description="reading", unit="image"):
            images.load(index)  # a broken one would be refused late

    set_arithmetic(Precision.fp32)
    crops = Crops(arguments.visual if arguments.out else 0)
    results = Results(arguments.images, arguments.set, len(images), [], machine())
    for group in models:
        watch = crops.ours if group is models[0] else None
        results.curves.append(model_curve(group, images, device=device, estimate=arguments.estimate, watch=watch))
        _write(results, crops, arguments.out)  # what is measured is kept, whatever the next codec does
    for codec in others:
        results.curves.append(other_curve(codec, images, watch=crops.other))
        _write(results, crops, arguments.out)
    Console(markup=False, emoji=False).print(console_table(results))  # names of images are no markup
    if arguments.out:
        print(f"{arguments.out}: {OUTPUTS if crops.chosen() else OUTPUTS.replace(' and visual.png', '')}")


def _refuse(arguments) -> None:
    """What can be told to be wrong without reading any file."""
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit} must be at least 1")
    if arguments.visual < 0:
        raise UserError(f"--visual {arguments.visual} must not be negative")
    if arguments.limit and arguments.set:
        raise UserError(f"--limit {arguments.limit} leaves no whole {arguments.set}; leave out --limit or --set")
    if arguments.out:
        out = Path(arguments.out)
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not there.is_dir():
            raise UserError(f"--out {out} cannot be a folder because {there} is a file; name a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"--out {out} cannot be written because {there} is read-only; name another folder")


def _write(results, crops, folder: str | None) -> None:
    """Everything measured so far, as files in the folder, if one is wanted."""
    if folder is None:
        return
    from hpcm_scale.evaluation.pictures import draw_crops
    from hpcm_scale.evaluation.rate_distortion_plot import draw_rate_distortion
    from hpcm_scale.evaluation.results import write_json
    from hpcm_scale.evaluation.tables import csv_table, markdown
    from hpcm_scale.files import write_text, writing

    out = Path(folder)
    with writing(out):
        write_json(results, out / "evaluation.json")
        write_text(out / "images.csv", csv_table(results))
        write_text(out / "evaluation.md", markdown(results))
        draw_rate_distortion(results, out / "rate_distortion.png")
        (out / "visual.png").unlink(missing_ok=True)  # of an evaluation before this one
        if crops.chosen():
            draw_crops(crops.chosen(), out / "visual.png", results.title)


if __name__ == "__main__":
    main()
