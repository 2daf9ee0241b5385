"""The command `hpcm sweep`: how far the runs of a sweep are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.live import Live

from hpcm_scale.errors import Parser, UserError, one_line
from hpcm_scale.scaling.runs import CONFIG_NAME
from hpcm_scale.sweeps.jobs import FILE_NAME, Planned, read_plan
from hpcm_scale.sweeps.state import Follower, RunState
from hpcm_scale.sweeps.table import console, table
from hpcm_scale.tracking.journal import FILE_NAME as JOURNAL_NAME

WATCH_SECONDS = 2.0


def parser() -> Parser:
    """The command line."""
    main = Parser(prog="hpcm sweep", description="Sweeps: many runs, trained by `hpcm train -m`.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    status = commands.add_parser(
        "status",
        help="how far the runs are",
        description="The runs below a folder, finished, running or yet to come: read from their journals, "
        "configurations and logs, so also from another machine that sees the folder.",
    )
    status.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="a sweep's folder, or any folder of runs")
    status.add_argument("--watch", action="store_true", help="stay, until all runs are finished or Ctrl-C")
    return main


def found_below(folder: Path) -> Iterator[tuple[Path, Planned | None]]:
    """The run folders in `folder` and below it, in order of name, with those that are only planned.

    Raises UserError for a `sweep.json` that is damaged.
    """
    if (folder / CONFIG_NAME).is_file() or (folder / JOURNAL_NAME).is_file():
        yield folder, None
        return
    plan = read_plan(folder)
    present = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    for name in [*plan, *sorted(present - plan.keys())]:
        if name in plan:
            yield folder / name, plan[name]
        else:
            yield from found_below(folder / name)


class Watch:
    """Looks at folders again and again; remembers what it has read of each journal."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._followers: dict[Path, Follower] = {}

    def look(self) -> list[RunState]:
        """The state of every run below the folders now, each once. Raises UserError where there is none."""
        found: dict[Path, Planned | None] = {}
        for folder in self._folders:
            if not folder.is_dir():
                raise UserError(f"there is no folder {folder}; name the folder of a sweep, such as runs/sweep_model")
            below = dict(found_below(folder.resolve()))
            if not below:
                raise UserError(f"no run in {folder}: neither run folders nor {FILE_NAME}; has training started?")
            found |= below
        for path, plan in found.items():
            self._followers.setdefault(path, Follower(path, plan))
        return [self._followers[path].look() for path in found]


@one_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `hpcm sweep` and `python -m hpcm_scale.commands.sweep`."""
    chosen = parser().parse_args(arguments)
    watch = Watch(chosen.folders)
    if not chosen.watch:
        console().print(table(watch.look()))
        return
    with Live(console=console(), auto_refresh=False) as screen:
        while True:
            states = watch.look()
            screen.update(table(states), refresh=True)
            if all(state.state == "finished" for state in states):
                return
            time.sleep(WATCH_SECONDS)


if __name__ == "__main__":
    main()
