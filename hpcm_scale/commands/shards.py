"""`hpcm shards`: build, verify and describe sets of webdataset shards."""

from __future__ import annotations

import argparse
import sys

from hpcm_scale.data.build import build_shards
from hpcm_scale.data.index import load_index
from hpcm_scale.data.processes import available_cores
from hpcm_scale.data.verify import counted, describe, verify_shards
from hpcm_scale.errors import Parser, UserError, one_line
from hpcm_scale.limits import PROCESSES, Range
from hpcm_scale.tracking.progress import progress

BYTES_PER_MB = 1_000_000


def parser() -> Parser:
    """The command line."""
    commands = Parser(prog="hpcm shards", description=__doc__.split(": ")[1])
    subcommands = commands.add_subparsers(dest="command", required=True, metavar="COMMAND")

    building = subcommands.add_parser(
        "build",
        help="from folders of photos to shards",
        description="Store JPEG, PNG and WebP photos, byte for byte, in webdataset shards with an index. "
        "Interrupted, it goes on when called again.",
    )
    building.add_argument("photos", nargs="+", metavar="PHOTOS", help="folders (and all below) or files")
    building.add_argument("--out", required=True, metavar="DIR", help="folder for the set")
    building.add_argument(
        "--min-side",
        type=Range(least=0, most=1_000_000).whole,
        default=0,
        metavar="PIXELS",
        help="skip photos with a smaller side",
    )
    building.add_argument(
        "--shard-size", type=Range(least=0.001, most=1_000_000).real, default=256, metavar="MB", help="default: 256"
    )
    building.set_defaults(run=build)

    verifying = subcommands.add_parser("verify", help="check every hash and decode every photo; exit code 1 on damage")
    verifying.add_argument("folder", metavar="DIR")
    verifying.set_defaults(run=verify)

    for command in (building, verifying):
        command.add_argument(
            "--workers",
            type=PROCESSES.whole,
            default=available_cores(),
            metavar="N",
            help="processes; default: every core",
        )

    describing = subcommands.add_parser("info", help="number, size and histogram of the photos")
    describing.add_argument("folder", metavar="DIR", help="folder or URL")
    describing.set_defaults(run=info)
    return commands


def build(arguments: argparse.Namespace) -> None:
    """`hpcm shards build`."""
    try:
        built = build_shards(
            arguments.photos,
            arguments.out,
            min_side=arguments.min_side,
            shard_size=round(arguments.shard_size * BYTES_PER_MB),
            workers=arguments.workers,
            progress=progress,
        )
    except KeyboardInterrupt:
        sys.stderr.write("hpcm: interrupted; the same command goes on from here\n")
        raise
    summary = f"{counted(len(built.index), 'photo')} in {counted(len(built.index.shards), 'shard')}"
    skipped = built.index.built["skipped"]
    summary += f", {skipped:,} skipped (see {built.report})" if skipped else ", none skipped"
    print(f"{arguments.out} is already finished: {summary}" if built.found_finished else summary)


def verify(arguments: argparse.Namespace) -> None:
    """`hpcm shards verify`: exit code 1 on damage."""
    if "://" in arguments.folder:
        raise UserError("verify reads every byte: call it where the shards lie, with their folder")
    index = load_index(arguments.folder)
    damages = verify_shards(arguments.folder, index, workers=arguments.workers, progress=progress)
    for damage in damages:
        print(f"damaged: {damage}")
    whole = f"{counted(len(index), 'photo')} in {counted(len(index.shards), 'shard')}"
    if damages:
        print(f"{counted(len(damages), 'problem')} in {whole}; restore from a copy or build again")
        sys.exit(1)
    print(f"{whole}: every hash is right and every photo decodes")


def info(arguments: argparse.Namespace) -> None:
    """`hpcm shards info`."""
    print(describe(arguments.folder, load_index(arguments.folder)))


@one_line
def main() -> None:
    """Entry point of `hpcm shards` and of `python -m hpcm_scale.commands.shards`."""
    arguments = parser().parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
