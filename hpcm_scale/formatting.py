"""Text and figures in which names appear as they are spelled: Markdown tables and matplotlib figures."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from hpcm_scale.files import whole_file

# Markdown in which names are shown as they are spelled.


_SPECIAL = re.compile(r"[\\`*<&\[$~]|(?<![^\W_])_|_(?![^\W_])")
"""What begins markup (on GitHub mathematics, too); an underscore inside a word does not."""


def escaped(text: str) -> str:
    """`text` on one line, shown as it is wherever Markdown is read; vertical bars are for `markdown_table`."""
    return _SPECIAL.sub(r"\\\g<0>", _one_line(text))


def code(text: str) -> str:
    """`text` on one line as a code span, whatever backticks it holds."""
    text = _one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table, its first `words` columns flush left and numbers flush right; cells may hold markup."""
    lines = [headings, ["---"] * words + ["--:"] * (len(headings) - words), *rows]
    cells = ([_one_line(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


# Figures in which names are drawn as they are spelled: no text is read as mathematics or TeX.


_LITERAL = {"text.parse_math": False, "text.usetex": False, "axes.formatter.use_mathtext": False}
"""Text objects take these when they are made, so ticks that are made on saving need them, too. Logarithmic axes need a
formatter of their own: matplotlib's writes mathematics, which would be shown as it is."""
_REPRODUCIBLE = {"svg.hashsalt": "hpcm_scale"}
_UNDATED = {".svg": {"metadata": {"Date": None}}, ".pdf": {"metadata": {"CreationDate": None}}}


@contextmanager
def new_figure(*, style: Mapping[str, Any] | None = None, **options: Any) -> Iterator[Figure]:
    """A figure to be drawn and saved (`save`) in here; every figure of the package is made by this function.

    Args:
        style: further entries of matplotlib's rcParams.
        options: of `matplotlib.figure.Figure`.
    """
    with matplotlib.rc_context({**_REPRODUCIBLE, **(style or {}), **_LITERAL}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)  # a box is drawn
        yield Figure(**options)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of the suffix of `path`, whole or not at all; the same figure gives the same bytes.

    To be called inside the `new_figure` that made it.
    """
    suffix = Path(path).suffix.lower()
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, format=suffix[1:] or "png", **_UNDATED.get(suffix, {}))


def label(name: str, most: int = 44) -> str:
    """A name as figures show it: one line of at most `most` characters, those at its end where it is longer.

    What cannot be printed becomes a space. matplotlib leaves what begins with an underscore out of legends, so an
    invisible character (U+200B) stands before it.
    """
    shown = "".join(character if character.isprintable() else " " for character in name)
    shown = shown if len(shown) <= most else "…" + shown[1 - most :]
    return f"\u200b{shown}" if shown.startswith("_") else shown
