"""The console command `hpcm`: finds the subcommand and hands the arguments over."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

from hpcm_scale import __version__
from hpcm_scale.errors import UserError, one_line

COMMANDS = {
    "shards": "build, verify and describe webdataset shards from folders of photos",
    "models": "the table of sizes: parameters, kMAC per pixel, TFLOP per training step",
    "estimate": "memory per GPU, FLOPs and time of a run, without a GPU",
    "check": "whether the nodes of a job can train a configuration: versions, links, data, one step",
    "train": "train one configuration, or several with -m (launch with `deepspeed` on many GPUs)",
    "sweep": "a live table of the runs of a sweep, trained by `hpcm train -m`",
    "ema": "weights averaged over a length chosen after training (see train.ema)",
    "cooldown": "from checkpoints of a run, train branches whose learning rate decays to zero",
    "encode": "photos to .hpcm files",
    "decode": ".hpcm files to PNG",
    "evaluate": "rate and distortion of weights, and of other codecs; what networks make of their pictures",
    "bd-rate": "the rate that one codec saves over another at equal quality",
    "import": "a checkpoint of the public HPCM implementation to weights",
    "export": "weights to a checkpoint of the public HPCM implementation",
    "bench": "how fast training, coding and their parts are here, against a baseline",
    "scaling": "what runs tell about scale: curves, laws, plans for the next size",
}


MODULES = {"import": "import_weights", "export": "export_weights"}
"""Of commands whose file in `commands/` has another name; - becomes _."""


def usage() -> str:
    """What `hpcm --help` says."""
    lines = [f"hpcm {__version__}: learned image codecs at scale", "", "usage: hpcm COMMAND …", ""]
    lines += [f"  {name:10s} {purpose}" for name, purpose in COMMANDS.items()]
    lines += ["", "hpcm COMMAND --help says more; python -m hpcm_scale.cli COMMAND does the same."]
    return "\n".join(lines)


@one_line
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
        hint = f"did you mean `{near[0]}`?" if near else f"choose one of {', '.join(COMMANDS)}."
        raise UserError(f"there is no command `{name}`; {hint}")
    sys.argv = [f"hpcm {name}", *arguments[1:]]
    package = "hpcm_scale" if name == "train" else "hpcm_scale.commands"  # `deepspeed --module hpcm_scale.train`
    import_module(f"{package}.{MODULES.get(name, name).replace('-', '_')}").main()


if __name__ == "__main__":
    main()
