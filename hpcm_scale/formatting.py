"""Numbers, tables and figures for people; names appear in them as they are spelled."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcm_scale.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

# Numbers.


DASH = "–"
"""A cell without a value."""
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def count(value: float, digits: int = 3, exact: bool = False) -> str:
    """A count with a unit: 211 k, 4.31 M, 1.00 B (10⁹); `exact`, for round numbers: 1 B."""
    for unit, name in _UNITS:
        if _rounded(value, digits) >= unit:
            return f"{value / unit:g} {name}" if exact else f"{significant(value / unit, digits)} {name}"
    return f"{value:g}" if exact else significant(value, digits)


def significant(value: float, digits: int = 4) -> str:
    """A number with `digits` significant digits, trailing zeros kept; very small or large ones as 1.50·10⁻⁷."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    power = math.floor(math.log10(abs(_rounded(value, digits))))
    if -4 <= power < max(digits, 5):
        return f"{value:,.{max(digits - 1 - power, 0)}f}".replace("-", "−")
    return f"{value / 10**power:.{digits - 1}f}·10{superscript(power)}".replace("-", "−")


def superscript(power: int) -> str:
    """An exponent in Unicode superscripts: ⁻⁷."""
    return str(power).translate(_SUPERSCRIPT)


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits - 1}e}")


def with_error(value: float, error: float | None) -> str:
    """A value and its standard error, both to the error's second digit: "0.331 ± 0.012"."""
    if error is None or not math.isfinite(error):
        return significant(value)
    if error == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{significant(value)} ± {significant(error, 2)}"
    decimals = min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}".replace("-", "−")


def decimal(value: float | None, digits: int) -> str:
    """A number with `digits` decimals and a minus sign; `DASH` for None."""
    return DASH if value is None else f"{value:.{digits}f}".replace("-", "−")


def percent(share: float, digits: int = 2) -> str:
    """A signed relative change: "+1.25 %", "−0.40 %"."""
    return f"{share * 100:+.{digits}f} %".replace("-", "−")


def duration(seconds: float | None) -> str:
    """A time as 59 s, 12:59 min, 3:00 h or 12.5 d; empty for None."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 172800:
        return f"{whole // 3600}:{whole // 60 % 60:02d} h"
    return f"{whole / 86400:,.1f} d"


# Tables on a terminal.


def terminal() -> Console:
    """A console that prints text unchanged: no markup, no highlighting."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def terminal_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1, title: str | None = None
) -> Table:
    """A table for `terminal`; its first `words` columns flush left, the first one folded, numbers flush right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    style = {"box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "collapse_padding": True}
    table = Table(**style, title=title, title_justify="left")
    for index, heading in enumerate(headings):
        justify = "left" if index < words else "right"
        table.add_column(heading, justify=justify, no_wrap=index > 0, overflow="fold" if index == 0 else "ellipsis")
    for row in rows:
        table.add_row(*row)
    return table


# Markdown in which names are shown as they are spelled.


_SPECIAL = re.compile(r"[\\`*<&\[$~]|(?<![^\W_])_|_(?![^\W_])")
"""Characters that start markup, or mathematics on GitHub; an underscore inside a word does not."""


def counted(count: int, noun: str) -> str:
    """A number with its noun, such as `1 image` or `1,234 images`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def escaped(text: str) -> str:
    """`text` on one line with markup escaped; `markdown_table` escapes vertical bars."""
    return _SPECIAL.sub(r"\\\g<0>", _one_line(text))


def code(text: str) -> str:
    """`text` on one line as a code span; it may contain backticks."""
    text = _one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table: the first `words` columns left-aligned, the others right-aligned. Cells may hold markup."""
    lines = [headings, ["---"] * words + ["--:"] * (len(headings) - words), *rows]
    cells = ([_one_line(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


# Figures: no text is read as mathematics or TeX, and the same figure gives the same bytes.

_LITERAL: dict[Any, Any] = {"text.parse_math": False, "text.usetex": False, "axes.formatter.use_mathtext": False}
"""Read by each text when it is created, which for ticks is at saving. Logarithmic axes need another formatter than
matplotlib's, which writes mathematics."""
_REPRODUCIBLE: dict[Any, Any] = {"svg.hashsalt": "hpcm_scale"}
_UNDATED: dict[str, dict[str, Any]] = {
    ".svg": {"metadata": {"Date": None}},
    ".pdf": {"metadata": {"CreationDate": None}},
}


@contextmanager
def new_figure(*, style: Mapping[Any, Any] | None = None, **options: Any) -> Iterator[Figure]:
    """Yield a figure to draw and `save` inside the context; every figure of the package is created here.

    Args:
        style: further entries of matplotlib's rcParams.
        options: of `matplotlib.figure.Figure`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_REPRODUCIBLE, **(style or {}), **_LITERAL}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)  # a box is drawn
        yield Figure(**options)


def tidy(axes: Axes) -> None:
    """Two spines and a light grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure atomically in the format of the suffix of `path`; call it inside `new_figure`."""
    suffix = Path(path).suffix.lower()
    with atomic_file(path) as unfinished:
        figure.savefig(unfinished, format=suffix[1:] or "png", **_UNDATED.get(suffix, {}))


def label(name: str, most: int = 44) -> str:
    """A name on one line for a figure; of a longer one the last `most` characters, after an ellipsis.

    Characters that cannot be printed become spaces. matplotlib omits labels that start with an underscore from
    legends, so an invisible U+200B precedes it.
    """
    shown = "".join(character if character.isprintable() else " " for character in name)
    shown = shown if len(shown) <= most else "…" + shown[1 - most :]
    return f"\u200b{shown}" if shown.startswith("_") else shown
