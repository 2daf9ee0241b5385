"""Command: the moving average of a run's weights of a length that was not kept.

hpcm ema runs/68m --length 0.08
"""

from __future__ import annotations

from pathlib import Path

from hpcm_scale.config.schema import AVERAGE
from hpcm_scale.errors import Parser, UserError, one_line
from hpcm_scale.limits import COUNT


@one_line
def main() -> None:
    """Entry point of `hpcm ema` and `python -m hpcm_scale.commands.ema`."""
    parser = Parser(
        prog="hpcm ema",
        description="Weights averaged over a length that is chosen after training, from the averages in the "
        "checkpoints of a run that was trained with train.ema (two lengths do best, such as [0.05,0.1]) and has kept "
        "checkpoints all along (train.checkpoint_every, train.keep_every).",
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "--length", type=AVERAGE.real, required=True, help="standard deviation relative to the training, such as 0.08"
    )
    parser.add_argument("--at", type=COUNT.whole, metavar="STEP", help="up to this checkpoint (default: the newest)")
    parser.add_argument("--out", help="weights to write (default: RUN/weights_ema_LENGTH_at_STEP.safetensors)")
    arguments = parser.parse_args()
    if arguments.out and Path(arguments.out).is_dir():
        raise UserError(f"--out {arguments.out} is a folder; name a file")

    from hpcm_scale.files import check_length, writing
    from hpcm_scale.training.posthoc import average, counted, save
    from hpcm_scale.training.run_folder import RunFolder

    check_length(arguments.out or arguments.run)
    made = average(arguments.run, arguments.length, arguments.at)
    for damaged in made.damaged:
        print(f"passed over: {damaged}")
    name = RunFolder(arguments.run).averaged_file(arguments.length)
    path = Path(arguments.out) if arguments.out else name.with_stem(f"{name.stem}_at_{made.step}")
    with writing(path):
        save(path, made)
    print(
        f"{path}: the average of length {arguments.length:g} at step {made.step}, from those of "
        f"{' and '.join(map(str, made.lengths))} in {counted(len(made.steps))}; its profile is met within "
        f"{100 * made.error:.2g} %"
    )


if __name__ == "__main__":
    main()
