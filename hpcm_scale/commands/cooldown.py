"""Command: train cooldowns, whose learning rate decays to zero, from checkpoints of constant-rate runs.

deepspeed --num_gpus 8 --module hpcm_scale.commands.cooldown runs/ladder/model=68m --at 200000 400000 --decay 0.2
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hpcm_scale.errors import Parser, entry_point, ignore_lost_output
from hpcm_scale.limits import COUNT, PART


def parser() -> Parser:
    """The command line."""
    command = Parser(
        prog="hpcm cooldown",
        description="Trains cooldowns: from a checkpoint of a constant-rate run the learning rate decays to zero as "
        "1 − √, in a new run beside it, so that one constant-rate run gives several annealed models. The same "
        "command resumes unfinished cooldowns. Launch it with as many processes as that run, for example with "
        "`deepspeed --module hpcm_scale.commands.cooldown`.",
    )
    command.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folder of a constant-rate run; cooldowns and files are ignored"
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
        help="fraction of all steps, those of the constant-rate run included, in which the rate decays "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override keys that may change when a run is resumed, such as eval.images or log.wandb",
    )
    return command


@entry_point
@ignore_lost_output()
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `hpcm cooldown` and `python -m hpcm_scale.commands.cooldown`."""
    from hpcm_scale.distributed.processes import without_launcher_arguments
    from hpcm_scale.sweeps.in_turn import train_in_turn
    from hpcm_scale.sweeps.jobs import Job
    from hpcm_scale.training.cooldown import constant_rate_runs, cooldown

    given = sys.argv[1:] if arguments is None else arguments
    chosen = parser().parse_args(without_launcher_arguments(given))
    runs, steps = constant_rate_runs(chosen.runs), dict.fromkeys(chosen.at)
    cooldowns = [cooldown(run, at, chosen.decay, chosen.set) for run in runs for at in steps]
    if code := train_in_turn([Job(config, ()) for config in cooldowns]):
        raise SystemExit(code)


if __name__ == "__main__":
    main()
