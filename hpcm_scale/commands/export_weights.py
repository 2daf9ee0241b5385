"""Command: a checkpoint for the public implementation from weights for use.

hpcm export runs/68m/weights.safetensors --out 68m.pth.tar
"""

from __future__ import annotations

from pathlib import Path

from hpcm_scale.errors import Parser, UserError, one_line
from hpcm_scale.model.public_checkpoints import PUBLISHED


@one_line
def main() -> None:
    """Entry point of `hpcm export` and `python -m hpcm_scale.commands.export_weights`."""
    parser = Parser(
        prog="hpcm export",
        description="A checkpoint that github.com/lyq133/LIC-HPCM loads, from weights of 68m, 64m_phi, 90m or 1b "
        "that were imported from there or trained with model.hyper_placement=upstream.",
    )
    parser.add_argument("weights", metavar="W.safetensors", help="a run folder's weights.safetensors, or imported ones")
    parser.add_argument("--out", required=True, help="checkpoint to write, for example 68m.pth.tar")
    arguments = parser.parse_args()
    if Path(arguments.out).is_dir():
        raise UserError(f"--out {arguments.out} is a folder; name a file")

    from hpcm_scale.files import writing
    from hpcm_scale.model.public_checkpoints import export_state, published_preset, write_checkpoint
    from hpcm_scale.model.weights import load_weights

    model, _ = load_weights(arguments.weights)
    state = export_state(model.state_dict(), model.config)
    with writing(arguments.out):
        write_checkpoint(arguments.out, state)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    name = PUBLISHED[published_preset(model.config)]
    print(f"{arguments.out}: {name} of github.com/lyq133/LIC-HPCM, {parameters:,} parameters")


if __name__ == "__main__":
    main()
