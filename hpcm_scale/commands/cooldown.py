"""Command: from checkpoints of runs, train branches whose learning rate decays to zero.

deepspeed --num_gpus 8 --module hpcm_scale.commands.cooldown runs/ladder/model=68m --at 200000 400000 --decay 0.2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hpcm_scale.errors import Parser, one_line, unread
from hpcm_scale.limits import COUNT, PART


def parser() -> Parser:
    """The command line."""
    command = Parser(
        prog="hpcm cooldown",
        description="Start decay branches: from a run's checkpoint on, its learning rate falls to zero as 1 − √, in a "
        "run of its own beside the trunk. So one trunk gives several annealed models. The same command goes on with "
        "what is unfinished. It takes as many processes as trained the trunk: launch it as you did there, with "
        "`deepspeed --module hpcm_scale.commands.cooldown`.",
    )
    command.add_argument(
        "runs", nargs="+", metavar="RUN", help="the run folder of a trunk; branches and files are passed over"
    )
    command.add_argument(
        "--at",
        nargs="+",
        type=COUNT.whole,
        required=True,
        metavar="STEP",
        help="steps with a checkpoint (see train.keep_at)",
    )
    command.add_argument(
        "--decay",
        type=PART.real,
        default=0.2,
        metavar="FRACTION",
        help="part of the branch's steps, the trunk's included, over which the rate falls (default: %(default)s)",
    )
    command.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="change what may change when a run goes on, such as eval.images or log.wandb",
    )
    return command


@one_line
@unread()
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `hpcm cooldown` and `python -m hpcm_scale.commands.cooldown`."""
    from hpcm_scale.distributed.processes import without_launcher_arguments
    from hpcm_scale.sweeps.in_turn import train_in_turn
    from hpcm_scale.sweeps.jobs import Job
    from hpcm_scale.training.cooldown import branch, trunks

    given = sys.argv[1:] if arguments is None else arguments
    chosen = parser().parse_args(without_launcher_arguments(given))
    steps = dict.fromkeys(chosen.at)
    branches = [branch(run, at, chosen.decay, chosen.set) for run in trunks(chosen.runs) for at in steps]
    code = train_in_turn([Job(config, ()) for config in branches])
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
