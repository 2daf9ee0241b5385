"""`hpcm evaluate`: rate, distortion, times and task metrics of weights and of baseline codecs on a folder of images."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpcm_scale.errors import Parser, UserError, entry_point
from hpcm_scale.files import check_folder, writing
from hpcm_scale.formatting import terminal
from hpcm_scale.limits import COUNT, QUALITY, Range

OUTPUTS = ("evaluation.json", "images.csv", "evaluation.md", "rate_distortion.png")
CROPS = "visual.png"
METRICS = ("psnr", "ms-ssim")
TASKS = ("agreement", "text")
TASK_OUTPUTS = ("task.json", "task.csv", "task.md", "task.png")


@entry_point
def main() -> None:
    """Entry point of `hpcm evaluate`."""
    arguments = _parser().parse_args()
    _check(arguments)

    from hpcm_scale.config.schema import Precision
    from hpcm_scale.evaluation.baselines import open_baseline
    from hpcm_scale.evaluation.crops import Crops
    from hpcm_scale.evaluation.curves import read_weights
    from hpcm_scale.evaluation.equal_psnr import sentences
    from hpcm_scale.evaluation.tables import console_table
    from hpcm_scale.model.layers import set_arithmetic
    from hpcm_scale.model.weights import device_of
    from hpcm_scale.tasks import plugin

    # All checks come before the first image is coded.
    device = device_of(arguments.device)
    baselines = [open_baseline(name) for name in arguments.against]
    models = read_weights(arguments.weights, arguments.qualities)
    for group in models:
        if group[0].curve in arguments.against:
            raise UserError(
                "curve-named-as-baseline",
                "--weights",
                f"--weights {group[0].curve}=… has the name of a codec in --against; choose another name",
            )
    tasks = plugin().task_evaluation(arguments.task, arguments.receivers, device) if arguments.task else None
    images = None if arguments.task == ["text"] else _image_section(arguments, tasks)
    sections = [images] if images else []
    if tasks:
        sections += tasks.text_sections(arguments.images, arguments.text_images, arguments.limit)

    set_arithmetic(Precision.fp32)
    out = Path(arguments.out) if arguments.out else None
    chosen = Crops(arguments.visual if out else 0)
    for section in sections:
        section.prepare()
        options = {"device": device, "estimate": arguments.estimate, "metrics": arguments.metrics}
        for _ in section.code(models, baselines, crops=chosen if section is images else None, **options):
            if out:  # results so far are written after each curve
                with writing(out):
                    if images:
                        _write(images.results, chosen, out)
                    if tasks:
                        tasks.write(out)
    console = terminal()
    if images:
        console.print(console_table(images.results))
        for sentence in sentences(images.results):
            console.print(sentence)
    if tasks:
        console.print(tasks.console())
    if out:
        files = [*(OUTPUTS if images else ()), *([CROPS] if chosen.chosen() else ()), *(TASK_OUTPUTS if tasks else ())]
        print(f"{out}: {', '.join(files[:-1])} and {files[-1]}")


def _parser() -> Parser:
    parser = Parser(
        prog="hpcm evaluate",
        description="Compress every image to a real file, decompress it and measure bits per pixel, PSNR (mean over "
        "images, on pixels rounded to 8 bits), MS-SSIM and seconds. Weights of one architecture, trained at several λ, "
        "form one curve; those of a variable-rate model form a curve each.",
    )
    parser.add_argument(
        "--weights",
        required=True,
        nargs="+",
        metavar="[NAME=]PATH",
        help="weights.safetensors of one or more runs; those with the same NAME form one curve of that name",
    )
    parser.add_argument(
        "--qualities",
        nargs="+",
        type=QUALITY.real,
        metavar="Q",
        help="points of variable-rate weights, 0 to 100; default: the levels of their training",
    )
    parser.add_argument("--images", help="folder of JPEG, PNG or WebP images")
    parser.add_argument(
        "--out", help=f"folder for {', '.join((*OUTPUTS, CROPS))} and, with --task, {', '.join(TASK_OUTPUTS)}"
    )
    parser.add_argument(
        "--task",
        type=_names,
        default=[],
        metavar="TASK,…",
        help="task metrics of decoded images: agreement (of tokens and classes with those of the original), text "
        "(character error rate on rendered images, on a scanned page, and on --images if that has a labels.csv with "
        "the columns file, text and, for images of several lines, left, top, width, height)",
    )
    parser.add_argument(
        "--receivers",
        type=_names,
        default=[],
        metavar="NAME,…",
        help="networks of --task; default: efficientnet-lite0,efficientnet-lite2 for agreement, pp-ocrv4,pp-ocrv6 for "
        "text",
    )
    parser.add_argument(
        "--text-images",
        type=Range(least=0, most=10_000).whole,
        default=2,
        metavar="N",
        help="rendered images for --task text, about 1,000 characters each (default: %(default)s)",
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="estimate bits from the likelihoods of one forward pass, in the training's precision; faster than files",
    )
    parser.add_argument("--set", help="check that the folder is this set: kodak, clic-pro-valid or tecnick")
    parser.add_argument(
        "--against",
        type=_names,
        default=[],
        metavar="CODEC,…",
        help="baseline codecs: any of jpeg, webp, avif, jxl, hevc, vvc",
    )
    parser.add_argument(
        "--points",
        nargs="+",
        default=[],
        metavar="FILE",
        help="rate-distortion points of others, for figures and tables: CompressAI's JSON, a CSV file with columns "
        "bpp, psnr, ms-ssim, another --out, or a curve of hpcm bd-rate --list",
    )
    parser.add_argument(
        "--metrics",
        type=_names,
        default=METRICS,
        metavar="METRIC,…",
        help=f"distortion metrics: {', '.join(METRICS)}; only psnr is faster (default: both)",
    )
    parser.add_argument(
        "--visual",
        type=Range(least=0, most=100).whole,
        default=3,
        metavar="N",
        help="crops in visual.png, beside the first codec of --against at the same rate (default: %(default)s; 0: no "
        "figure)",
    )
    parser.add_argument("--limit", type=COUNT.whole, metavar="N", help="use only the first N images")
    parser.add_argument("--device", help="for example cuda or cpu; default: cuda if there is one")
    return parser


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def _check(arguments: argparse.Namespace) -> None:
    """Raises UserError for arguments that do not belong together; reads no file."""
    for task in arguments.task:
        if task not in TASKS:
            raise UserError("unknown-task", "--task", f"there is no task {task!r}; choose from {', '.join(TASKS)}")
    for metric in arguments.metrics:
        if metric not in METRICS:
            raise UserError(
                "unknown-metric", "--metrics", f"there is no metric {metric!r}; choose from {', '.join(METRICS)}"
            )
    only_text = arguments.task == ["text"]
    if arguments.points and only_text:
        raise UserError("points-without-images", "--points", "--points needs --images with another task; omit it")
    if not arguments.images and not only_text:
        raise UserError(
            "no-images", "--images", "--images is missing; give a folder of images, except with only --task text"
        )
    if arguments.task and arguments.estimate:
        raise UserError("task-of-estimate", "--estimate", "--task needs images decoded from files; omit --estimate")
    if arguments.receivers and not arguments.task:
        raise UserError(
            "receivers-without-task", "--receivers", "--receivers needs --task; add it, or omit --receivers"
        )
    if arguments.set and only_text:
        raise UserError("set-without-images", "--set", "--set has no effect with only --task text; omit it")
    if arguments.limit and arguments.set:
        raise UserError(
            "limit-of-set",
            "--limit",
            f"--limit {arguments.limit} makes {arguments.set} incomplete; omit --limit or --set",
        )
    if arguments.out:
        check_folder(arguments.out)


def _image_section(arguments: argparse.Namespace, tasks):
    """The folder of images, with the measures of `tasks`, if there are any."""
    from hpcm_scale.evaluation.curves import Results, Section, system_info

    given = _given(arguments)
    images = _images(arguments, tasks)
    results = Results(arguments.images, arguments.set, len(images), [], system_info(), given)
    return tasks.image_section(results, images) if tasks else Section(results, images)


def _given(arguments: argparse.Namespace) -> tuple:
    """The curves of --points. Raises UserError for a curve of another image set than --set."""
    from hpcm_scale.evaluation.points import find_curves

    curves = tuple(curve for place in arguments.points for curve in find_curves(place))
    for curve in curves:
        if arguments.set and curve.set not in (None, arguments.set):
            raise UserError(
                "points-of-another-set",
                "--points",
                f"--points {curve.name} are on {curve.set}, not on {arguments.set}; omit them",
            )
    return curves


def _images(arguments: argparse.Namespace, tasks):
    """The images of the folder; all are decoded and their sizes checked."""
    from hpcm_scale.data.sources import ImageSet
    from hpcm_scale.evaluation.bd_rate import check_set
    from hpcm_scale.objective import too_small
    from hpcm_scale.tracking.progress import progress

    images = ImageSet(arguments.images, arguments.limit)
    if arguments.set:
        check_set(arguments.set, images)
        return images
    for index in progress(range(len(images)), description="reading", unit="image"):
        pixels = images.load(index)  # raises for a damaged image
        if "psnr" not in arguments.metrics and too_small(pixels):
            raise UserError(
                "image-below-ms-ssim",
                "--metrics",
                f"{images.names[index]} is too small for MS-SSIM; add psnr to --metrics, or omit the image",
            )
        if tasks:
            tasks.check(pixels.shape[1:], images.names[index])
    return images


def _write(results, crops, out: Path) -> None:
    """Write the results so far on the folder of images."""
    from hpcm_scale.evaluation.crops import draw_crops
    from hpcm_scale.evaluation.rate_distortion_plot import draw_rate_distortion
    from hpcm_scale.evaluation.tables import csv_table, markdown, write_json
    from hpcm_scale.files import write_text

    write_json(results, out / "evaluation.json")
    write_text(out / "images.csv", csv_table(results))
    write_text(out / "evaluation.md", markdown(results))
    draw_rate_distortion(results, out / "rate_distortion.png")
    (out / CROPS).unlink(missing_ok=True)  # from an earlier evaluation
    if crops.chosen():
        draw_crops(crops.chosen(), out / CROPS, results.title)
