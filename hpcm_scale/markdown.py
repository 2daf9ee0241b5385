"""Markdown in which names are shown as they are spelled."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
