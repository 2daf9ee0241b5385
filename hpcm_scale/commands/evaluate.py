"""Command: rate, distortion and times of exported weights on a folder of images, beside other codecs; task quality."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpcm_scale.errors import Parser, UserError, one_line
from hpcm_scale.files import check_folder
from hpcm_scale.limits import COUNT, QUALITY, Range

OUTPUTS = ("evaluation.json", "images.csv", "evaluation.md", "rate_distortion.png")
CROPS = "visual.png"
METRICS = ("psnr", "ms-ssim")
TASKS = ("agreement", "text")
TASK_OUTPUTS = ("task.json", "task.csv", "task.md", "task.png")


@one_line
def main() -> None:
    """Entry point of `hpcm evaluate` and `python -m hpcm_scale.commands.evaluate`."""
    arguments = _parser().parse_args()
    _refuse(arguments)

    from rich.console import Console

    from hpcm_scale.config.schema import Precision
    from hpcm_scale.evaluation.baselines import other_codec
    from hpcm_scale.evaluation.curves import read_weights
    from hpcm_scale.evaluation.pictures import Crops
    from hpcm_scale.evaluation.tables import console_table, machine
    from hpcm_scale.evaluation.task.plan import TaskResults, parameters_of
    from hpcm_scale.evaluation.task.report import task_console
    from hpcm_scale.model.layers import set_arithmetic
    from hpcm_scale.model.weights import device_of

    # All that can be refused is refused before the first image is coded.
    device = device_of(arguments.device)
    others = [other_codec(name) for name in arguments.against]
    models = read_weights(arguments.weights, arguments.qualities)
    for group in models:
        if group[0].curve in arguments.against:
            raise UserError(f"--weights {group[0].curve}=… has the name of a codec in --against; give it another")
    photos, texts = _sections(arguments, device)
    sections = [photos, *texts] if photos else texts
    tasks = TaskResults([section for section in sections if section.measures], parameters_of(models), machine())

    set_arithmetic(Precision.fp32)
    chosen = Crops(arguments.visual if arguments.out else 0)
    for section in sections:
        section.look_at_originals()
        crops = chosen if section is photos else None
        options = {"estimate": arguments.estimate, "metrics": arguments.metrics}
        for _ in section.code(models, others, device=device, crops=crops, **options):
            if arguments.out:  # what is measured is kept, whatever the next codec does
                _write(photos, chosen, tasks, Path(arguments.out))
    console = Console(markup=False, emoji=False, highlight=False)  # names of images are no markup
    if photos:
        console.print(console_table(photos.results))
    if tasks.sections:
        console.print(task_console(tasks))
    if arguments.out:
        written = (*(OUTPUTS if photos else ()), *([CROPS] if chosen.chosen() else []))
        *first, last = (*written, *(TASK_OUTPUTS if tasks.sections else ()))
        print(f"{arguments.out}: {', '.join(first)} and {last}")


def _parser() -> Parser:
    parser = Parser(
        prog="hpcm evaluate",
        description="Compress every image to a real file, decompress it from those bytes, and measure: bits per pixel, "
        "PSNR (mean over images, on pixels rounded to 8 bits), MS-SSIM, seconds. Weights of one architecture, "
        "trained at several λ, make one curve; those of a variable-rate model make one alone.",
    )
    parser.add_argument(
        "--weights",
        required=True,
        nargs="+",
        metavar="[NAME=]PATH",
        help="weights.safetensors of one or more runs; those of one NAME make one curve, called so",
    )
    parser.add_argument(
        "--qualities",
        nargs="+",
        type=QUALITY.real,
        metavar="Q",
        help="points of variable-rate weights, 0 to 100; default: the levels that they learned",
    )
    parser.add_argument("--images", help="folder of JPEG, PNG or WebP images")
    parser.add_argument("--out", help=f"folder for {', '.join((*OUTPUTS, CROPS))}; of tasks {', '.join(TASK_OUTPUTS)}")
    parser.add_argument(
        "--task",
        type=_names,
        default=[],
        metavar="TASK,…",
        help="what decoded images are worth to networks: agreement (tokens and classes are those of the original), "
        "text (what is written can be read: on pictures made here, on a scanned page, and on those of --images if "
        "there is a labels.csv, its columns file, text and, for pictures of several lines, left, top, width, height)",
    )
    parser.add_argument(
        "--receivers",
        type=_names,
        default=[],
        metavar="NAME,…",
        help="networks of the tasks; default: efficientnet-lite0,efficientnet-lite2 for agreement, pp-ocrv4,pp-ocrv6 "
        "for text",
    )
    parser.add_argument(
        "--text-pictures",
        type=Range(least=0, most=10_000).whole,
        default=2,
        metavar="N",
        help="of --task text: pictures of text to make, about 1,000 characters each (default: %(default)s)",
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="one forward pass instead of a file: bits from the likelihoods, in the precision of the training; faster",
    )
    parser.add_argument("--set", help="refuse the folder unless it is this set: kodak, clic-pro-valid or tecnick")
    parser.add_argument(
        "--against",
        type=_names,
        default=[],
        metavar="CODEC,…",
        help="other codecs for the same images: any of jpeg, webp, avif, jxl, hevc, vvc",
    )
    parser.add_argument(
        "--points",
        nargs="+",
        default=[],
        metavar="FILE",
        help="rate-distortion points that others measured, drawn and listed beside ours: CompressAI's JSON, a CSV file "
        "with columns bpp, psnr, ms-ssim, another --out, or a curve that hpcm bd-rate --list names",
    )
    parser.add_argument(
        "--metrics",
        type=_names,
        default=METRICS,
        metavar="METRIC,…",
        help=f"what is measured of decoded images: {', '.join(METRICS)}; psnr alone is faster (default: both)",
    )
    parser.add_argument(
        "--visual",
        type=Range(least=0, most=100).whole,
        default=3,
        metavar="N",
        help="crops in visual.png (default: %(default)s; 0: no picture)",
    )
    parser.add_argument("--limit", type=COUNT.whole, help="use only the first so many images")
    parser.add_argument("--device", help="for example cuda or cpu; default: cuda where there is one")
    return parser


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def _refuse(arguments: argparse.Namespace) -> None:
    """What can be told to be wrong without reading any file."""
    for task in arguments.task:
        if task not in TASKS:
            raise UserError(f"there is no task {task!r}; choose from {', '.join(TASKS)}")
    for metric in arguments.metrics:
        if metric not in METRICS:
            raise UserError(f"there is no metric {metric!r}; choose from {', '.join(METRICS)}")
    only_text = arguments.task == ["text"]
    if arguments.points and only_text:
        raise UserError("--points are drawn beside the rates of photos, and --task text codes none; leave them out")
    if not arguments.images and not only_text:
        raise UserError("name a folder of images with --images; only --task text does without")
    if arguments.task and arguments.estimate:
        raise UserError("--task looks at what real files decode to; leave out --estimate")
    if arguments.receivers and not arguments.task:
        raise UserError("--receivers is for --task; name a task, or leave it out")
    if arguments.set and only_text:
        raise UserError(f"--set {arguments.set} is for photos, and --task text codes pictures of text; leave it out")
    if arguments.limit and arguments.set:
        raise UserError(f"--limit {arguments.limit} leaves no whole {arguments.set}; leave out --limit or --set")
    if arguments.out:
        check_folder(arguments.out)


def _sections(arguments: argparse.Namespace, device):
    """The folder of images, unless only text is wanted, and the sets of pictures of text."""
    from hpcm_scale.evaluation.tables import Results, machine
    from hpcm_scale.evaluation.task.plan import photo_section, task_receivers, text_sections

    receivers = task_receivers(arguments.task, arguments.receivers)
    photos, texts, only_text = None, [], arguments.task == ["text"]
    if not only_text:
        given = _given(arguments)
        images = _images(arguments)
        results = Results(arguments.images, arguments.set, len(images), [], machine(), given)
        photos = photo_section(images, results, receivers.get("agreement", ()), device)
    if "text" in arguments.task:
        sets = (arguments.images, only_text and arguments.images, arguments.text_pictures, arguments.limit)
        texts = text_sections(*sets, receivers["text"], device, machine())
    return photos, texts


def _given(arguments: argparse.Namespace) -> tuple:
    """The curves of --points, none of which is known to be of other images."""
    from hpcm_scale.evaluation.points import find_curves

    curves = tuple(curve for place in arguments.points for curve in find_curves(place))
    for curve in curves:
        if arguments.set and curve.set not in (None, arguments.set):
            raise UserError(f"--points {curve.name} are of {curve.set}, not of {arguments.set}; leave them out")
    return curves


def _images(arguments: argparse.Namespace):
    """The images of the folder, once all are known to be sound and large enough."""
    from hpcm_scale.data.sources import ImageSet
    from hpcm_scale.evaluation.bd_rate import check_set
    from hpcm_scale.evaluation.task.agreement import MEND
    from hpcm_scale.machine.extractor import check_size
    from hpcm_scale.objective import too_small
    from hpcm_scale.tracking.progress import progress

    images = ImageSet(arguments.images, arguments.limit)
    if arguments.set:
        check_set(arguments.set, images)
        return images
    for index in progress(range(len(images)), description="reading", unit="image"):
        pixels = images.load(index)  # a broken one would be refused late
        if "psnr" not in arguments.metrics and too_small(pixels):
            raise UserError(f"{images.names[index]} is too small for MS-SSIM; add psnr to --metrics, or leave it out")
        if "agreement" in arguments.task:
            check_size(pixels.shape[1:], images.names[index], MEND)
    return images


def _write(photos, crops, tasks, out: Path) -> None:
    """Everything measured so far, as files in the folder."""
    from hpcm_scale.evaluation.pictures import draw_crops
    from hpcm_scale.evaluation.rate_distortion_plot import draw_rate_distortion
    from hpcm_scale.evaluation.tables import csv_table, markdown, write_json
    from hpcm_scale.evaluation.task.report import draw_tasks, task_csv, task_markdown, write_task_json
    from hpcm_scale.files import write_text, writing

    with writing(out):
        if photos:
            write_json(photos.results, out / "evaluation.json")
            write_text(out / "images.csv", csv_table(photos.results))
            write_text(out / "evaluation.md", markdown(photos.results))
            draw_rate_distortion(photos.results, out / "rate_distortion.png")
            (out / CROPS).unlink(missing_ok=True)  # of an evaluation before this one
        if crops.chosen():
            draw_crops(crops.chosen(), out / CROPS, photos.results.title)
        if tasks.measured:
            write_task_json(tasks, out / "task.json")
            write_text(out / "task.csv", task_csv(tasks))
            write_text(out / "task.md", task_markdown(tasks))
            draw_tasks(tasks, out / "task.png")


if __name__ == "__main__":
    main()
