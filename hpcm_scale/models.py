"""Command: the table of sizes."""

from __future__ import annotations

from hpcm_scale.config.compose import compose_model, preset_names
from hpcm_scale.errors import Parser, one_line


@one_line
def main() -> None:
    """Entry point of `hpcm models` and `python -m hpcm_scale.models`."""
    parser = Parser(
        prog="hpcm models",
        description="Parameters by part, multiply-accumulates per pixel (forward, 256×256) and FLOPs of a "
        "training step of 32 crops of 256×256 for every size in conf/model.",
    )
    parser.parse_args()
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from hpcm_scale.training.costs import size_row

    rows = sorted((size_row(compose_model(name)) for name in preset_names("model")), key=lambda row: row.parameters)
    table = Table(box=SIMPLE_HEAD, caption=_CAPTION, caption_justify="left", pad_edge=False, collapse_padding=True)
    table.add_column("model", no_wrap=True)
    for heading in ("parameters", "g_a", "g_s", "hyper", "context", "kMAC/px", "TFLOP/step"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        parts = [f"{count / 1e6:,.2f}" for count in row.parts.values()]
        rates = [f"{row.kmac_per_pixel:,.1f}", f"{row.step_tflop:,.2f}"]
        table.add_row(row.name, f"{row.parameters:,}", *parts, *rates)
    Console().print(table)


_CAPTION = (
    "g_a, g_s, hyper (h_a, h_s and the prior of z), context: millions of parameters. kMAC/px: forward pass, 256×256. "
    "TFLOP/step: forward and backward of 32 crops of 256×256. 68m, 64m_phi, 90m and 1b are the public "
    "implementation's; 120m, 246m and 544m are our own, matched to the paper's counts; the smaller ones are 68m with "
    "its widths divided by 2, 4, 6, 8, 12 and 16."
)


if __name__ == "__main__":
    main()
