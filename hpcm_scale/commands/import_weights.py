"""Command: weights for use from a checkpoint of the public implementation.

hpcm import 0.013.pth.tar --preset 68m --lmbda 0.013 --out hpcm_base.safetensors
"""

from __future__ import annotations

from pathlib import Path

from hpcm_scale.errors import Parser, UserError, one_line
from hpcm_scale.limits import LAMBDA
from hpcm_scale.model.public_checkpoints import PUBLISHED


@one_line
def main() -> None:
    """Entry point of `hpcm import` and `python -m hpcm_scale.commands.import_weights`."""
    parser = Parser(
        prog="hpcm import",
        description="Weights for use from a checkpoint of github.com/lyq133/LIC-HPCM: HPCM_Base (68m), "
        "HPCM_Base_PhiContext (64m_phi), HPCM_Large (90m) or HPCM_1B (1b, λ = 0.0483). Only tensors are read from the "
        "file; no code in it is run.",
    )
    parser.add_argument("checkpoint", metavar="FILE.pth.tar", help="the file as the authors publish it")
    parser.add_argument("--preset", required=True, choices=PUBLISHED, help="which model it is")
    parser.add_argument("--out", required=True, help="weights file to write, for example hpcm_base.safetensors")
    parser.add_argument("--lmbda", type=LAMBDA.real, help="λ of its training, as published")
    parser.add_argument(
        "--distortion", choices=("mse", "ms_ssim"), default="mse", help="what it was trained for (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if Path(arguments.out).is_dir():
        raise UserError(f"--out {arguments.out} is a folder; name a file")

    from hpcm_scale.files import writing
    from hpcm_scale.model.public_checkpoints import (
        import_state,
        published_config,
        read_checkpoint,
        without_channel_scales,
    )
    from hpcm_scale.model.weights import save_weights

    checkpoint = read_checkpoint(arguments.checkpoint)
    state = import_state(checkpoint, arguments.preset)
    source = f"{PUBLISHED[arguments.preset]} of github.com/lyq133/LIC-HPCM, {Path(arguments.checkpoint).name}"
    facts = {"lmbda": arguments.lmbda, "distortion": arguments.distortion, "precision": "fp32"}
    facts |= {"step": None, "images": None, "pflops": None}
    # Copies: tensors of a foreign file may overlap, and the file may change while it is mapped.
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    with writing(arguments.out):
        save_weights(arguments.out, state, published_config(arguments.preset), facts | {"source": source})
    parameters = sum(tensor.numel() for tensor in state.values())
    print(f"{arguments.out}: {arguments.preset}, {parameters:,} parameters, from {source}")
    if without_channel_scales(checkpoint):
        print("it holds no adaptive_params_list: all ones, as in the authors' training")


if __name__ == "__main__":
    main()
