"""Command: estimated rate and distortion of exported weights on a folder of images."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

from hpcm_scale.errors import Parser, UserError, one_line


@one_line
def main() -> None:
    """Entry point of `hpcm evaluate` and `python -m hpcm_scale.evaluate`."""
    parser = Parser(
        prog="hpcm evaluate",
        description="Bits per pixel (estimated from the likelihoods), PSNR and loss of exported weights, per image "
        "and mean: the mean over images of each, the PSNR on pixels rounded to 8 bits.",
    )
    parser.add_argument("--weights", required=True, help="a run folder's weights.safetensors")
    parser.add_argument("--images", required=True, help="folder of JPEG, PNG or WebP images")
    parser.add_argument("--out", help="folder for evaluation.json and reconstructions.png")
    parser.add_argument("--limit", type=int, help="use only the first so many images")
    parser.add_argument("--pictures", type=int, default=3, help="rows of reconstructions.png (default: %(default)s)")
    parser.add_argument("--device", help="for example cuda or cpu; default: cuda where there is one")
    arguments = parser.parse_args()
    for name in ("limit", "pictures"):
        number = getattr(arguments, name)
        if number is not None and number < 1:
            raise UserError(f"--{name} {number} must be at least 1")
    if arguments.out and Path(arguments.out).exists() and not Path(arguments.out).is_dir():
        raise UserError(f"--out {arguments.out} is a file; name a folder")

    import torch

    from hpcm_scale.config.schema import Precision
    from hpcm_scale.data.image_set import ImageSet
    from hpcm_scale.evaluation.estimate import evaluate
    from hpcm_scale.evaluation.pictures import draw_reconstructions
    from hpcm_scale.files import write_text
    from hpcm_scale.model.weights import load_weights
    from hpcm_scale.tracking.progress import progress

    images = ImageSet(arguments.images, arguments.limit)
    model, facts = load_weights(arguments.weights)
    device = _place(model, arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.precision = Precision(facts["precision"])  # that of its training, so that the journal's numbers come again
    torch.backends.cudnn.allow_tf32 = False  # what is to be fp32 is fp32, as in training
    evaluation = evaluate(
        model,
        images,
        multiple=model.multiple,
        lmbda=facts["lmbda"],
        device=device,
        keep=arguments.pictures if arguments.out else 0,
        progress=partial(progress, description="evaluating", unit="image"),
    )
    mean = evaluation.mean()
    _print_table(evaluation, mean)
    if arguments.out:
        out = Path(arguments.out)
        result = {
            "weights": arguments.weights,
            "model": model.config.name,
            "facts": facts,
            "rate": "estimated",
            "mean": mean,
            "images": [asdict(image) for image in evaluation.images],
        }
        write_text(out / "evaluation.json", json.dumps(result, indent=1))
        spent = f"{facts['step']:,} steps ({facts['pflops']:.3g} PFLOPs)"
        title = f"{model.config.name} after {spent}, λ = {facts['lmbda']}"
        draw_reconstructions(evaluation.reconstructions, out / "reconstructions.png", title)
        print(f"{out / 'evaluation.json'}, {out / 'reconstructions.png'}")


def _place(model, name: str):
    """Move the model to the device of that name."""
    try:
        return next(model.to(name).parameters()).device
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); leave it out, or name cpu") from error


def _print_table(evaluation, mean: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("image", "size", "loss", "bpp (estimated)", "PSNR (dB)"):
        table.add_column(heading, justify="left" if heading == "image" else "right")
    for image in evaluation.images:
        size = f"{image.width}×{image.height}"
        table.add_row(image.name, size, f"{image.loss:.4f}", f"{image.bpp:.4f}", f"{image.psnr:.2f}")
    table.add_section()
    table.add_row("mean", "", f"{mean['loss']:.4f}", f"{mean['bpp']:.4f}", f"{mean['psnr']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
