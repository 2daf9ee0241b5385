"""The console command `hpcm`: dispatches to the subcommands."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

from hpcm_scale import __version__
from hpcm_scale.errors import UserError, entry_point

COMMANDS = {
    "shards": "build, verify and describe webdataset shards from folders of images",
    "models": "the table of sizes: parameters, kMAC per pixel, TFLOP per training step",
    "estimate": "memory per GPU, FLOPs and time of a run, without a GPU",
    "check": "check the nodes of a job for training: versions, links, data, one step",
    "train": "train one configuration, or several with -m (launch with `deepspeed` on many GPUs)",
    "sweep": "a live table of the runs of a sweep, trained by `hpcm train -m`",
    "ema": "post-hoc EMA: weights averaged over a length chosen after training (see train.ema)",
    "cooldown": "train cooldowns, which decay the learning rate to zero, from checkpoints of a run",
    "encode": "images to .hpcm files",
    "decode": ".hpcm files to PNG",
    "evaluate": "rate and distortion of weights and baseline codecs; accuracy of vision models on decoded images",
    "bd-rate": "average rate saving of one codec over another at equal quality",
    "import": "a checkpoint of the public HPCM implementation to weights",
    "export": "weights to a checkpoint of the public HPCM implementation",
    "bench": "speed of training, coding and their parts, against a baseline",
    "scaling": "scaling analysis of runs: curves, laws, plans for the next size",
}


FUNCTIONS = {
    "train": "train.main",  # `deepspeed --module hpcm_scale.train`
    "encode": "commands.coding.encode",
    "decode": "commands.coding.decode",
    "import": "commands.weights.import_weights",
    "export": "commands.weights.export_weights",
}
"""Functions of the commands that are not `main` of a file in `commands/` with their name (- is _ there)."""


def usage() -> str:
    """The text of `hpcm --help`."""
    lines = [f"hpcm {__version__}: learned image codecs at scale", "", "usage: hpcm COMMAND …", ""]
    lines += [f"  {name:10s} {purpose}" for name, purpose in COMMANDS.items()]
    lines += ["", "See hpcm COMMAND --help for options; python -m hpcm_scale.cli COMMAND is equivalent."]
    return "\n".join(lines)


@entry_point
def main() -> None:
    """Entry point of the `hpcm` console script."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    name = arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"choose one of {', '.join(COMMANDS)}"
        raise UserError("unknown-command", "", f"there is no command `{name}`; {hint}")
    sys.argv = [f"hpcm {name}", *arguments[1:]]
    module, function = FUNCTIONS.get(name, f"commands.{name.replace('-', '_')}.main").rsplit(".", 1)
    getattr(import_module(f"hpcm_scale.{module}"), function)()


if __name__ == "__main__":
    main()
