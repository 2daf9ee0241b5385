"""Command: progress of the runs of a sweep.

hpcm sweep status runs/ladder --watch
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.live import Live

from hpcm_scale.errors import Parser, entry_point
from hpcm_scale.sweeps.status import Follower, console, look, table

WATCH_SECONDS = 2.0


def parser() -> Parser:
    """The command line."""
    main = Parser(prog="hpcm sweep", description="Sweeps: many runs, trained by `hpcm train -m`.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    status = commands.add_parser(
        "status",
        help="progress of the runs",
        description="The runs below a folder, finished, running or waiting, from their journals, configurations and "
        "logs; it works from every node that can read the folder.",
    )
    status.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="a sweep's folder, or any folder of runs")
    status.add_argument("--watch", action="store_true", help="update until all runs are finished, or Ctrl-C")
    return main


@entry_point
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `hpcm sweep`."""
    chosen = parser().parse_args(arguments)
    followers: dict[Path, Follower] = {}
    if not chosen.watch:
        console().print(table(look(chosen.folders, followers)))
        return
    with Live(console=console(), auto_refresh=False) as screen:
        while True:
            states = look(chosen.folders, followers)
            screen.update(table(states), refresh=True)
            if all(state.state == "finished" for state in states):
                return
            time.sleep(WATCH_SECONDS)
