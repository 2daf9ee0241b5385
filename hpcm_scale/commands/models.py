"""Command `hpcm models`: the table of sizes.

hpcm models --family swin --size 30m,100m,1b
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcm_scale.config.compose import compose_model, preset_names
from hpcm_scale.config.schema import ModelConfig, PriorConfig
from hpcm_scale.errors import Parser, entry_point
from hpcm_scale.model.ladder import sized

if TYPE_CHECKING:
    from rich.table import Table

    from hpcm_scale.training.costs import SizeRow


@entry_point
def main() -> None:
    """Entry point of `hpcm models`."""
    parser = Parser(
        prog="hpcm models",
        description="Parameters by part, multiply-accumulates per pixel (forward, 256×256) and FLOPs of a "
        "training step of 32 crops of 256×256 for every size in conf/model, or for sizes of the size ladder.",
    )
    parser.add_argument(
        "--family", help="only sizes of this family of transforms, such as hpcm or swin, with their shapes"
    )
    parser.add_argument(
        "--size", metavar="N,N,…", help="sizes of the ladder, such as 30m,100m,1b (default family: hpcm)"
    )
    chosen = parser.parse_args()
    models = _models(chosen.family, chosen.size)
    from rich.console import Console

    from hpcm_scale.training.costs import size_row

    rows = sorted(((size_row(model), model) for model in models), key=lambda pair: pair[0].parameters)
    console, shapes = Console(), bool(chosen.family or chosen.size)
    console.print(_costs([row for row, _ in rows], _UNITS if shapes else f"{_UNITS} {_ORIGINS}"))
    if shapes:
        console.print(_shapes([model for _, model in rows]))


def _models(family: str | None, sizes: str | None) -> list[ModelConfig]:
    if sizes:
        family = family or "hpcm"
        return [sized(ModelConfig(family=family, size=size)) for size in sizes.split(",")]
    presets = [compose_model(name) for name in preset_names("model")]
    if family is None:
        return [model for model in presets if model.size is None]
    from hpcm_scale.model import families  # torch is slow to import

    families.family(family)  # raises for an unknown one
    return [sized(model) for model in presets if model.family == family]


def _table(numbers: list[str], caption: str, wrapped: bool = False) -> Table:
    """A table of models, with columns of numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False, collapse_padding=True)
    table.add_column("model", no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=not wrapped)
    return table


def _costs(rows: list[SizeRow], caption: str) -> Table:
    table = _table(["parameters", "g_a", "g_s", "hyper", "context", "kMAC/px", "TFLOP/step"], caption)
    for row in rows:
        parts = [_short(count / 1e6, 2) for count in row.parts.values()]
        rates = [_short(row.kmac_per_pixel, 1), _short(row.step_tflop, 2)]
        table.add_row(row.name, f"{row.parameters:,}", *parts, *rates)
    return table


def _short(number: float, digits: int) -> str:
    """A number with `digits` decimals, or none if it is large."""
    return f"{number:,.0f}" if number >= 10_000 or (number >= 1000 and digits > 1) else f"{number:,.{digits}f}"


def _shapes(models: list[ModelConfig]) -> Table:
    adaptors = any(sum(model.adaptor_blocks) for model in models)
    headings = ["c1 c2 c3", "M", "N", "h", "g_a", "g_s", "h_a", "s1 s2", "s3", *(["adaptors"] if adaptors else [])]
    table = _table(headings, f"{_SHAPES}{_ADAPTORS if adaptors else ''}.", wrapped=True)
    for model in models:
        widths = map(str, (model.latent_channels, model.hyper_latent_channels, model.hyper_channels))
        blocks = map(_joined, (model.g_a_blocks, model.g_s_blocks, model.hyper_blocks))
        priors = map(_prior, (model.prior_s1_s2, model.prior_s3))
        last = [_joined(model.adaptor_blocks)] if adaptors else []
        table.add_row(model.name, _joined(model.channels), *widths, *blocks, *priors, *last)
    return table


def _joined(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def _prior(depth: PriorConfig) -> str:
    return f"{depth.before}+{depth.after}" + (f"+{depth.refine}" if depth.refine else "")


_UNITS = (
    "g_a, g_s, hyper (h_a, h_s and the prior of z), context: millions of parameters. kMAC/px: forward pass, 256×256. "
    "TFLOP/step: forward and backward of 32 crops of 256×256."
)
_ORIGINS = (
    "68m, 64m_phi, 90m and 1b are those of the public implementation; 120m, 246m and 544m are our own, matched to the "
    "parameters of the paper; those below 68m are 68m with widths divided by 2, 4, 6, 8, 12 and 16. For any other "
    "size, such as hpcm_30m, use the size ladder: --family hpcm --size 30m."
)
_SHAPES = (
    "Channels of the transforms at 1/2, 1/4 and 1/8 resolution, of y (M), of z (N) and in the hyper transforms (h). "
    "Residual blocks of g_a, fine to coarse, of g_s, coarse to fine, of h_a and h_s, at 1/16 and 1/32, and of the "
    "prior networks of s1 and s2, and of s3"
)
_ADAPTORS = ", and of the adaptors of s1, s2 and s3"
