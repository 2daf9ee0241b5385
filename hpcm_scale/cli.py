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
    "train": "train one configuration, or several with -m (launch with `deepspeed` on many GPUs)",
    "evaluate": "rate and distortion of exported weights on a folder of images",
    "scaling": "loss-against-compute curves of finished or running runs",
}


def usage() -> str:
    """What `hpcm --help` says."""
    lines = [f"hpcm {__version__}: learned image codecs at scale", "", "usage: hpcm COMMAND …", ""]
    lines += [f"  {name:10s} {purpose}" for name, purpose in COMMANDS.items()]
    lines += ["", "hpcm COMMAND --help says more; python -m hpcm_scale.COMMAND does the same."]
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
    module = "hpcm_scale.scaling.__main__" if name == "scaling" else f"hpcm_scale.{name}"
    sys.argv = [f"hpcm {name}", *arguments[1:]]
    import_module(module).main()


if __name__ == "__main__":
    main()
