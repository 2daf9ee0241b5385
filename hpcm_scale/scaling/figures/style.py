"""Common style of the figures: size, type, colours, axes and legends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis, YAxis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from hpcm_scale.errors import UserError
from hpcm_scale.formatting import count, new_figure, superscript
from hpcm_scale.scaling.analysis import Analysis
from hpcm_scale.scaling.filters import TRAINING
from hpcm_scale.scaling.laws.law import Prediction
from hpcm_scale.scaling.observations import LOSSES

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette without its yellow: distinct for colour-blind readers."""
MARKERS = "osD^vh<p>X"
FORMATS = (".png", ".svg", ".pdf")
WIDEST = 1.5
"""Factor between a law and its upper bound above which the interval is not drawn."""
WIDTH = 3.5
"""Inches: one column of a two-column paper, at the final type size."""
COMPUTE = "training compute (PFLOPs; 1 PFLOP = 10¹⁵ floating-point operations)"
SHORT_COMPUTE = "training compute C (PFLOPs)"
PARAMETERS = "parameters N"

_PAPER = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 6.8,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.borderpad": 0.2,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
}


@contextmanager
def paper() -> Iterator[Figure]:
    """A figure of one column's width; set its height, draw and save it within the context."""
    with new_figure(style=_PAPER, figsize=(WIDTH, WIDTH), dpi=300, layout="constrained") as figure:
        yield figure


def check_format(path: str | Path) -> Path:
    """`path` if its suffix is a format that can be drawn. Raises UserError otherwise."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UserError(
            "unknown-figure-format", "--out", f"cannot draw {path.name}; use a suffix of {', '.join(FORMATS)}"
        )
    return path


def colours(number: int) -> list[str]:
    """`number` colours, in order; from viridis if there are more than in the palette."""
    if number <= len(COLOURS):
        return list(COLOURS[:number])
    return [to_hex(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0, 0.9, number))]


def marker(index: int) -> str:
    """The marker of the `index`-th series."""
    return MARKERS[index % len(MARKERS)]


def tidy(axes: Axes) -> None:
    """Two spines and a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)


def number_log(axis: Axis, multiples: Sequence[float]) -> None:
    """Label a logarithmic axis at these multiples of every power of ten, with plain numbers."""
    axis.set_major_locator(LogLocator(subs=tuple(multiples), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def log_axis(axis: XAxis | YAxis, low: float, high: float, most: int = 6) -> None:
    """Make an axis logarithmic from `low` to `high` with about `most` round tick labels.

    Ticks are equally spaced below a factor of three, and powers of ten beyond six decades.
    """
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(low, high)
    axis.set_major_locator(FixedLocator(round_numbers(low, high, most)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_locator(NullLocator())


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """Round numbers between `low` and `high` (both positive) for the ticks of a logarithmic axis."""
    if high < 3 * low:
        even = MaxNLocator(most - 1, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        return [value for value in even if low <= value <= high]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for multiples in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [
            float(f"{m}e{decade}") for decade in decades for m in multiples if low <= float(f"{m}e{decade}") <= high
        ]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def plain(value: float) -> str:
    """A tick label: 0.002, 50, or a power of ten such as 10⁶."""
    if 1e-3 <= value < 1e5:
        return f"{value:,.6g}"
    power = math.floor(math.log10(value) + 1e-9)
    digits = f"{value / 10**power:.3g}"
    return f"10{superscript(power)}" if digits == "1" else f"{digits}·10{superscript(power)}"


def number_parameters(axis: Axis) -> None:
    """Tick labels such as 300 k, 1 M, 3 M."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: count(value, exact=True)))


def ribbon(axes: Axes, x: np.ndarray, expected: Prediction, **style) -> np.ndarray:
    """Fill the interval of a law where it is narrower than `WIDEST`; returns where that is, bool of the shape of x."""
    narrow = expected.high < WIDEST * expected.value  # False for NaN
    if narrow.any():
        axes.fill_between(x, expected.low, expected.high, where=narrow, linewidth=0, **style)
    return narrow


def size_styles(sizes: dict[str, int]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each model, in order of parameters."""
    ordered = sorted(sizes, key=lambda model: (sizes[model], model))
    return {
        model: (colour, marker(i)) for i, (model, colour) in enumerate(zip(ordered, colours(len(ordered)), strict=True))
    }


def loss_label(analysis: Analysis) -> str:
    """Label of the loss axis."""
    kind = "training loss" if analysis.metric == TRAINING else "evaluation loss"
    return f"{kind}  {LOSSES[analysis.distortion]}"


def column(figure: Figure, handles: Sequence[Artist], columns: int = 3) -> None:
    """A legend below the axes, in columns."""
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.0)
