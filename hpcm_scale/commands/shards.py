"""`hpcm shards`: build, verify and describe sets of webdataset shards."""

from __future__ import annotations

import argparse
import sys

from hpcm_scale.data.build import build_shards
from hpcm_scale.data.index import load_index
from hpcm_scale.data.processes import available_cores
from hpcm_scale.data.verify import describe, verify_shards
from hpcm_scale.errors import Parser, UserError, entry_point
from hpcm_scale.files import without_secrets
from hpcm_scale.formatting import counted
from hpcm_scale.limits import PROCESSES, Range
from hpcm_scale.tracking.progress import progress

BYTES_PER_MB = 1_000_000


def parser() -> Parser:
    """The command line."""
    commands = Parser(prog="hpcm shards", description="build, verify and describe sets of webdataset shards.")
    subcommands = commands.add_subparsers(dest="command", required=True, metavar="COMMAND")

    building = subcommands.add_parser(
        "build",
        help="store image files as shards",
        description="Store JPEG, PNG and WebP images, byte for byte, in webdataset shards with an index. "
        "An interrupted build continues when the command is run again.",
    )
    building.add_argument("images", nargs="+", metavar="IMAGES", help="folders (with their subfolders) or files")
    building.add_argument("--out", required=True, metavar="DIR", help="folder for the set")
    building.add_argument(
        "--min-side",
        type=Range(least=0, most=1_000_000).whole,
        default=0,
        metavar="PIXELS",
        help="skip images with a smaller side",
    )
    building.add_argument(
        "--shard-size", type=Range(least=0.001, most=1_000_000).real, default=256, metavar="MB", help="default: 256"
    )
    building.set_defaults(run=build)

    verifying = subcommands.add_parser("verify", help="check every hash and decode every image; exit code 1 on damage")
    verifying.add_argument("folder", metavar="DIR")
    verifying.set_defaults(run=verify)

    for command in (building, verifying):
        command.add_argument(
            "--workers",
            type=PROCESSES.whole,
            default=available_cores(),
            metavar="N",
            help="processes; default: all cores",
        )

    describing = subcommands.add_parser("info", help="number, size and histogram of the images")
    describing.add_argument("folder", metavar="DIR", help="folder or URL")
    describing.set_defaults(run=info)
    return commands


def build(arguments: argparse.Namespace) -> None:
    """`hpcm shards build`."""
    try:
        built = build_shards(
            arguments.images,
            arguments.out,
            min_side=arguments.min_side,
            shard_size=round(arguments.shard_size * BYTES_PER_MB),
            workers=arguments.workers,
            progress=progress,
        )
    except KeyboardInterrupt:
        sys.stderr.write("hpcm: interrupted; run the same command again to continue\n")
        raise
    summary = f"{counted(len(built.index), 'image')} in {counted(len(built.index.shards), 'shard')}"
    skipped = built.index.built["skipped"]
    summary += f", {skipped:,} skipped (see {built.report})" if skipped else ", none skipped"
    print(f"{arguments.out} is already finished: {summary}" if built.found_finished else summary)


def verify(arguments: argparse.Namespace) -> None:
    """`hpcm shards verify`: exits with code 1 on damage."""
    if "://" in arguments.folder:
        raise UserError(
            "verify-needs-folder",
            "",
            f"hpcm shards verify reads every byte and takes no URL such as {without_secrets(arguments.folder)}; run it "
            "where the shards are stored",
        )
    index = load_index(arguments.folder)
    damages = verify_shards(arguments.folder, index, workers=arguments.workers, progress=progress)
    for damage in damages:
        print(f"damaged: {damage}")
    whole = f"{counted(len(index), 'image')} in {counted(len(index.shards), 'shard')}"
    if damages:
        print(f"{counted(len(damages), 'problem')} in {whole}; restore from a copy or build again")
        sys.exit(1)
    print(f"{whole}: every hash matches and every image decodes")


def info(arguments: argparse.Namespace) -> None:
    """`hpcm shards info`."""
    print(describe(arguments.folder, load_index(arguments.folder)))


@entry_point
def main() -> None:
    """Entry point of `hpcm shards` and of `python -m hpcm_scale.commands.shards`."""
    arguments = parser().parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
