"""The command line of `hpcm bench` and its checks."""

from __future__ import annotations

import difflib
from pathlib import Path

from hpcm_scale.config.checks import side_multiple
from hpcm_scale.config.compose import preset_names
from hpcm_scale.config.schema import Checkpointing, Config, Precision
from hpcm_scale.errors import Parser, UserError
from hpcm_scale.files import check_folder
from hpcm_scale.limits import COUNT, CROP, PROCESSES, Range
from hpcm_scale.model.ladder import compose_sized

_SYMBOLS = Range(least=1, most=100_000_000)


def parser() -> Parser:
    """The command line."""
    main = Parser(
        prog="hpcm bench",
        description="Time and memory of baseline and candidates, measured alternately, and the ratios of their times, "
        "round by round.",
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_optimizer(commands)
    _add_processes(commands)
    _add_data(commands)
    _add_codec(commands)
    _add_entropy(commands)
    return main


def check(chosen) -> None:
    """Raise UserError for an --out that cannot be written and for options without the ones that they need."""
    if chosen.out is not None:
        check_folder(chosen.out)
    if getattr(chosen, "limit", None) and not chosen.images:
        raise UserError("limit-without-images", "--limit", "--limit needs a folder of images; add --images FOLDER")
    if getattr(chosen, "profile", False) and chosen.out is None:
        raise UserError("profile-without-out", "--profile", "--profile writes a figure to --out; add --out FOLDER")


def configuration(preset: str, crop: int = 256) -> Config:
    """The configuration of a preset, for crops of side `crop` pixels.

    Raises UserError for an unknown preset, or a crop that does not fit it.
    """
    config = compose_sized([*choice(preset), f"data.crop={crop}"])
    multiple = side_multiple(config.model)
    if crop % multiple:
        nearest = max(multiple, round(crop / multiple) * multiple)
        raise UserError(
            "crop-does-not-fit",
            "--crop",
            f"--crop {crop} does not fit {preset}, whose inputs are multiples of {multiple} pixels; use {nearest}",
        )
    return config


def choice(preset: str) -> list[str]:
    """The overrides for a preset or a size of a family such as hpcm_30m. Raises UserError for another name."""
    names = preset_names("model")
    if preset in names:
        return [f"model={preset}"]
    from hpcm_scale.model import families  # torch is slow to import

    family, _, size = preset.rpartition("_")
    if family in families.names():
        return [f"model={family}", f"model.size={size}"]
    near = difflib.get_close_matches(preset, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names)}"
    raise UserError("unknown-preset", "--preset", f"there is no preset {preset}; {hint}")


def _add_train(commands) -> None:
    train = commands.add_parser(
        "train",
        help="a training step: time, utilisation, activation memory",
        description="Time training steps of one size: as the public implementation computes them (fp32, NCHW, eager: "
        "the baseline) and as this package does. Utilisation is relative to large matrix products of the same "
        "precision in the same rounds.",
    )
    _add_common(train, rounds=7)
    _add_size(train, "68m")
    _add_crops(train, batch=2, of="in a step")
    train.add_argument(
        "--precision",
        nargs="+",
        choices=[precision.value for precision in Precision],
        default=["fp32", "bf16"],
        help="of the candidates (default: fp32 bf16); recomputation and compilation use the last one",
    )
    train.add_argument(
        "--checkpoint",
        nargs="+",
        choices=[checkpoint.value for checkpoint in Checkpointing],
        default=[checkpoint.value for checkpoint in Checkpointing],
        help="activation checkpointing (default: none blocks steps)",
    )
    train.add_argument("--compile", action="store_true", help="also compile each candidate; takes minutes more")
    train.add_argument(
        "--profile",
        action="store_true",
        help="draw the time by kind of operation, for baseline and fastest, to train_profile.png",
    )


def _add_optimizer(commands) -> None:
    optimizer = commands.add_parser(
        "optimizer",
        help="steps of Adam, Muon and SOAP, and whole steps by number of crops",
        description="Time the optimizers' steps and forward and backward passes over several numbers of crops, and "
        "relate them to Adam's in the same rounds.",
    )
    _add_common(optimizer, rounds=7)
    _add_size(optimizer, "68m")
    optimizer.add_argument(
        "--batches",
        type=Range(least=1, most=4096).whole,
        nargs="+",
        metavar="N",
        default=[2, 8],
        help="numbers of crops in a step (default: 2 8)",
    )
    _add_crop(optimizer)
    optimizer.add_argument(
        "--precision",
        choices=[precision.value for precision in Precision],
        default="bf16",
        help="of forward and backward (default: %(default)s)",
    )


def _add_processes(commands) -> None:
    processes = commands.add_parser(
        "processes",
        help="a training step of two processes against one, on CPUs",
        description="Time fp32 steps of one process, of two separate processes and of two that train together, each "
        "with one thread: the cost of sharing the machine, and of communication.",
    )
    _add_common(processes, rounds=7, device=False)
    _add_size(processes, "small")
    _add_crops(processes, batch=1, of="per process")
    processes.add_argument(
        "--engines",
        nargs="+",
        choices=preset_names("engine"),
        default=["zero2", "zero3"],
        help="of conf/engine (default: zero2 zero3)",
    )


def _add_data(commands) -> None:
    data = commands.add_parser(
        "data",
        help="crops per second, compared with the JPEG decoder alone",
        description="Time the training stream from shards to batches of crops, and processes that only decode the same "
        "images (the baseline); compute how many crops training on a GPU needs.",
    )
    _add_common(data, rounds=7, device=False)
    data.add_argument("--shards", metavar="FOLDER", help="images (default: synthetic ones of 2 megapixels)")
    _add_crops(data, batch=32, of="in a batch")
    data.add_argument(
        "--batches", type=COUNT.whole, metavar="N", default=4, help="per worker and round (default: %(default)s)"
    )
    data.add_argument("--workers", type=PROCESSES.whole, metavar="N", help="data workers (default: one per core)")


def _add_codec(commands) -> None:
    codec = commands.add_parser(
        "codec",
        help="encoding and decoding: time, and the entropy coder's share of it",
        description="Time the coding of images to .hpcm files and back: with networks as in the public implementation "
        "(fp32, NCHW, eager: the baseline), and with the optimized ones.",
    )
    _add_common(codec, rounds=5)
    model = codec.add_mutually_exclusive_group()
    model.add_argument("--preset", default="68m", help="size of an untrained model (default: %(default)s)")
    model.add_argument("--weights", metavar="FILE", help="weights.safetensors of a trained one")
    codec.add_argument(
        "--images", metavar="FOLDER", help="JPEG, PNG or WebP images (default: a synthetic image of 768×512)"
    )
    codec.add_argument("--limit", type=COUNT.whole, metavar="N", help="use only the first N images")


def _add_entropy(commands) -> None:
    entropy = commands.add_parser(
        "entropy",
        help="symbols per second of the range coder, and time of the likelihood",
        description="Time the range coder for several groupings of symbols, and the training likelihood, forward and "
        "backward, compared with the public formula.",
    )
    _add_common(entropy, rounds=15)
    entropy.add_argument(
        "--symbols",
        type=_SYMBOLS.whole,
        metavar="N",
        default=491_520,
        help="to code (default: %(default)s, a Kodak image of 68m)",
    )
    entropy.add_argument(
        "--elements",
        type=_SYMBOLS.whole,
        metavar="N",
        default=2 * 320 * 16 * 16,
        help="of the latent whose bits are taken (default: %(default)s, two crops of 256² of 68m)",
    )
    entropy.add_argument("--compile", action="store_true", help="compile the likelihood of this package")


def _add_size(command: Parser, preset: str) -> None:
    command.add_argument(
        "--preset",
        default=preset,
        help="preset of conf/model, or a size such as hpcm_30m (default: %(default)s; see hpcm models)",
    )


def _add_crops(command: Parser, batch: int, of: str) -> None:
    command.add_argument(
        "--batch",
        type=Range(least=1, most=4096).whole,
        metavar="N",
        default=batch,
        help=f"crops {of} (default: %(default)s)",
    )
    _add_crop(command)


def _add_crop(command: Parser) -> None:
    command.add_argument(
        "--crop", type=CROP.whole, metavar="PX", default=256, help="side of a crop (default: %(default)s)"
    )


def _add_common(command: Parser, rounds: int, device: bool = True) -> None:
    command.add_argument(
        "--rounds", type=COUNT.whole, metavar="N", default=rounds, help="runs of each candidate (default: %(default)s)"
    )
    if device:
        command.add_argument("--device", help="for example cuda or cpu; default: cuda if available")
    command.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write JSON and Markdown to it; default: print only"
    )
