"""Command: progress and results of the runs of a sweep.

hpcm sweep status runs/ladder --watch
hpcm sweep table runs/ladder --csv ladder.csv
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.live import Live

from hpcm_scale.errors import Parser, entry_point
from hpcm_scale.sweeps.status import Follower, console, look, table
from hpcm_scale.sweeps.table import grouped, seeds_table, write_csv

WATCH_SECONDS = 2.0


def parser() -> Parser:
    """The command line."""
    main = Parser(prog="hpcm sweep", description="Sweeps: many runs, trained by `hpcm train -m`.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    status = commands.add_parser(
        "status",
        help="progress of the runs",
        description="The runs below a folder, finished, running or waiting, from their journals, configurations and "
        "logs; it works from every node that can read the folder. The forecast is the final training loss of a run "
        "that trains: a law E + B·D^−β of the images D, fitted to the last 80 % of its smoothed curve, at train.steps. "
        "A decay of the learning rate that is still to come is not in it: it would lower the loss further.",
    )
    status.add_argument("--watch", action="store_true", help="update until all runs are finished, or Ctrl-C")
    table = commands.add_parser(
        "table",
        help="losses of the runs by configuration, as a table or CSV",
        description="Loss, bpp, PSNR and compute of each configuration: of runs that differ in train.seed only and are "
        "at the same step, the mean and its 95 % interval (Student's t).",
    )
    table.add_argument("--csv", metavar="FILE", type=Path, help="write the table, numbers in full precision")
    for command in (status, table):
        command.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="folders of sweeps or of any runs")
    return main


@entry_point
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `hpcm sweep`."""
    chosen = parser().parse_args(arguments)
    if chosen.command == "table":
        rows = grouped(look(chosen.folders, {}))
        console().print(seeds_table(rows))
        if chosen.csv:
            write_csv(rows, chosen.csv)
        return
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
