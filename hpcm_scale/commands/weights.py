"""Commands: `hpcm import` and `hpcm export`, weights from and to checkpoints of the public implementation."""

from __future__ import annotations

from pathlib import Path

from hpcm_scale.errors import Parser, entry_point
from hpcm_scale.files import check_file, writing
from hpcm_scale.limits import LAMBDA
from hpcm_scale.model.public_checkpoints import PUBLISHED


@entry_point
def import_weights() -> None:
    """Entry point of `hpcm import`."""
    parser = Parser(
        prog="hpcm import",
        description="Convert a checkpoint of github.com/lyq133/LIC-HPCM to weights: HPCM_Base (68m), "
        "HPCM_Base_PhiContext (64m_phi), HPCM_Large (90m) or HPCM_1B (1b, λ = 0.0483). Only tensors are read from the "
        "file; no code in it is run.",
    )
    parser.add_argument("checkpoint", metavar="FILE.pth.tar", help="the file as the authors publish it")
    parser.add_argument("--preset", required=True, choices=PUBLISHED, help="its model")
    parser.add_argument("--out", required=True, help="weights file to write, for example hpcm_base.safetensors")
    parser.add_argument("--lmbda", type=LAMBDA.real, help="λ of its training, as published")
    parser.add_argument(
        "--distortion", choices=("mse", "ms_ssim"), default="mse", help="distortion of its loss (default: %(default)s)"
    )
    arguments = parser.parse_args()
    check_file(arguments.out)

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
        print("it has no adaptive_params_list: these channel scales are ones, as in the authors' training")


@entry_point
def export_weights() -> None:
    """Entry point of `hpcm export`."""
    parser = Parser(
        prog="hpcm export",
        description="Convert weights of 68m, 64m_phi, 90m or 1b to a checkpoint that github.com/lyq133/LIC-HPCM loads. "
        "They were imported from there, or trained with model.hyper_placement=upstream.",
    )
    parser.add_argument(
        "weights", metavar="W.safetensors", help="weights.safetensors of a run folder, or imported ones"
    )
    parser.add_argument("--out", required=True, help="checkpoint to write, for example 68m.pth.tar")
    arguments = parser.parse_args()
    check_file(arguments.out)

    from hpcm_scale.model.public_checkpoints import export_state, published_preset, write_checkpoint
    from hpcm_scale.model.weights import load_weights

    model, _ = load_weights(arguments.weights)
    state = export_state(model.state_dict(), model.config)
    with writing(arguments.out):
        write_checkpoint(arguments.out, state)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    preset = published_preset(model.config)
    assert preset is not None  # `export_state` has checked it
    print(f"{arguments.out}: {PUBLISHED[preset]} of github.com/lyq133/LIC-HPCM, {parameters:,} parameters")
