"""The command `hpcm scaling`: what runs tell about scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpcm_scale.errors import Parser, one_line
from hpcm_scale.files import writing
from hpcm_scale.scaling.curves import draw_loss_against_compute
from hpcm_scale.scaling.runs import Run, find_runs


def parser() -> Parser:
    """The command line."""
    main = Parser(prog="hpcm scaling", description="What runs, finished or running, tell about scale.")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    curves = commands.add_parser("curves", help="draw loss against compute", description="Draw loss against compute.")
    curves.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or a folder of runs")
    curves.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        default=Path("loss_vs_compute.png"),
        help="the figure, .png, .svg or .pdf (default: %(default)s)",
    )
    return main


def summary(run: Run) -> str:
    """One line: how far a run is and what it came to."""
    compute, loss = run.curve("train/loss")
    evaluation = run.curve("eval/loss")[1]
    state = f"{run.name}: step {run.step:,} of {run.config['train']['steps']:,}"
    if compute.size:
        state += f", {compute[-1]:,.4g} PFLOPs, training loss {loss[-1]:.4f}"
    if evaluation.size:
        state += f", evaluation loss {evaluation[-1]:.4f}"
    return state


@one_line
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `hpcm scaling` and `python -m hpcm_scale.scaling`."""
    chosen = parser().parse_args(arguments)
    runs = find_runs(chosen.runs)
    with writing(chosen.out):
        draw_loss_against_compute(runs, chosen.out)
    print("\n".join(map(summary, runs)))
    print(f"drawn: {chosen.out}")


if __name__ == "__main__":
    main()
