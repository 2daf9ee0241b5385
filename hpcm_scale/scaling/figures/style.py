"""What all figures share: size, type, colours, axes that read well, and files that come out the same each time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from hpcm_scale.errors import UserError
from hpcm_scale.formatting import new_figure
from hpcm_scale.scaling.analysis import Analysis
from hpcm_scale.scaling.filters import TRAINING
from hpcm_scale.scaling.laws.law import Prediction
from hpcm_scale.scaling.wording import LOSSES, count

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Okabe and Ito's palette without its yellow: told apart by colour-blind readers."""
MARKERS = "osD^vh<p>X"
FORMATS = (".png", ".svg", ".pdf")
WIDEST = 1.5
"""Factor between a law and the end of its interval from which on a ribbon says nothing, and is not drawn."""
WIDTH = 3.5
"""Inches: one column of a two-column paper, where the type below is its real size."""
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
    """A figure one column wide, to be given its height, drawn and saved in here."""
    with new_figure(style=_PAPER, figsize=(WIDTH, WIDTH), dpi=300, layout="constrained") as figure:
        yield figure


def check_format(path: str | Path) -> Path:
    """`path`, if figures can be drawn in the format of its suffix; raises UserError otherwise."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UserError(f"cannot draw {path.name}; end its name in one of {', '.join(FORMATS)}")
    return path


def colours(number: int) -> list[str]:
    """So many colours, in order; from a map made for colour-blind readers where the palette ends."""
    if number <= len(COLOURS):
        return list(COLOURS[:number])
    return [to_hex(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0, 0.9, number))]


def marker(index: int) -> str:
    """A marker for the so-manieth of several things, beside its colour."""
    return MARKERS[index % len(MARKERS)]


def calm(axes: Axes) -> None:
    """No more ink than is read: two spines, a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)


def number_log(axis: Axis, multiples: Sequence[float]) -> None:
    """Label a logarithmic axis at these multiples of every power of ten, with plain numbers."""
    axis.set_major_locator(LogLocator(subs=tuple(multiples), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def log_axis(axis: Axis, low: float, high: float, most: int = 6) -> None:
    """Make an axis logarithmic from `low` to `high` with at most about `most` round numbers on it.

    Under a factor of three the numbers are even steps; beyond six decades, powers of ten.
    """
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    (axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim)(low, high)
    axis.set_major_locator(FixedLocator(round_numbers(low, high, most)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axis.set_minor_locator(NullLocator())


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """Round numbers between `low` and `high` (both positive) that lie well on a logarithmic axis."""
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
    """A number on an axis: 0.002, 50, 10⁶ as a power where zeros would have to be counted."""
    if 1e-3 <= value < 1e5:
        return f"{value:,.6g}"
    power = math.floor(math.log10(value) + 1e-9)
    digits = f"{value / 10**power:.3g}"
    exponent = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{exponent}" if digits == "1" else f"{digits}·10{exponent}"


def number_parameters(axis: Axis) -> None:
    """Write the numbers of an axis of parameters as 300 k, 1 M, 3 M."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: count(value, exact=True)))


def ribbon(axes: Axes, x: np.ndarray, expected: Prediction, **style) -> np.ndarray:
    """Fill the interval of a law where it tells something (`WIDEST`); returns where that is, bool like `x`."""
    tells = expected.high < WIDEST * expected.value  # so is not NaN
    if tells.any():
        axes.fill_between(x, expected.low, expected.high, where=tells, linewidth=0, **style)
    return tells


def size_styles(sizes: dict[str, int]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each model, in the order of their parameters."""
    ordered = sorted(sizes, key=lambda model: (sizes[model], model))
    return {
        model: (colour, marker(i)) for i, (model, colour) in enumerate(zip(ordered, colours(len(ordered)), strict=True))
    }


def over_parameters(figure: Figure, axes: Axes, analysis: Analysis) -> None:
    """What every figure of loss over parameters ends with: numbers and labels of its axes, the legend."""
    number_parameters(axes.xaxis)
    axes.set_xlabel(PARAMETERS)
    axes.set_ylabel(loss_label(analysis))
    calm(axes)
    column(figure, axes.get_legend_handles_labels()[0], 2)


def loss_label(analysis: Analysis) -> str:
    """What is on the axis of losses."""
    kind = "training loss" if analysis.metric == TRAINING else "evaluation loss"
    return f"{kind}  {LOSSES[analysis.distortion]}"


def column(figure: Figure, handles: Sequence[Artist], columns: int = 3) -> None:
    """A legend below the axes, in columns."""
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, columnspacing=1.0)
