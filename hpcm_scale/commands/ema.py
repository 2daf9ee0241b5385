"""Command: post-hoc EMA of a run's weights.

hpcm ema runs/68m --length 0.08
"""

from __future__ import annotations

from pathlib import Path

from hpcm_scale.config.schema import AVERAGE
from hpcm_scale.errors import Parser, entry_point
from hpcm_scale.files import check_file, check_length, writing
from hpcm_scale.limits import COUNT


@entry_point
def main() -> None:
    """Entry point of `hpcm ema`."""
    parser = Parser(
        prog="hpcm ema",
        description="Writes an EMA of the weights whose length is chosen after training, from the EMAs in the "
        "checkpoints of a run with train.ema (preferably two lengths, such as [0.05,0.1]) that keeps checkpoints "
        "throughout training (train.checkpoint_every, train.keep_every).",
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "--length", type=AVERAGE.real, required=True, help="standard deviation relative to the training, such as 0.08"
    )
    parser.add_argument("--at", type=COUNT.whole, metavar="STEP", help="up to this checkpoint (default: the newest)")
    parser.add_argument("--out", help="weights to write (default: RUN/weights_ema_LENGTH_at_STEP.safetensors)")
    arguments = parser.parse_args()
    if arguments.out:
        check_file(arguments.out)

    from hpcm_scale.formatting import counted
    from hpcm_scale.training.post_hoc_ema import post_hoc_ema, save
    from hpcm_scale.training.run_folder import RunFolder

    check_length(arguments.out or arguments.run)
    ema = post_hoc_ema(arguments.run, arguments.length, arguments.at)
    for damaged in ema.damaged:
        print(f"skipped: {damaged}")
    default = RunFolder(arguments.run).ema_file(arguments.length)
    path = Path(arguments.out) if arguments.out else default.with_stem(f"{default.stem}_at_{ema.step}")
    with writing(path):
        save(path, ema)
    print(
        f"{path}: EMA of length {arguments.length:g} at step {ema.step}, from lengths "
        f"{' and '.join(map(str, ema.lengths))} in {counted(len(ema.steps), 'checkpoint')}; error of its profile "
        f"{100 * ema.error:.2g} %"
    )
