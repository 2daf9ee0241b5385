"""Names that users may give to folders, runs, models and curves, and that figures and tables could misread."""

from __future__ import annotations

ODD_NAMES = (
    "$x$",
    "price $5 and $6",
    r"a$\frac{$b",
    r"\alpha & #1",
    "100 %_{x}^2",
    "_leading",
    "__both__",
    "two\nlines",
    "a|b",
    "`code`",
    "*bold* <b>&amp;",
    "[red]x[/red]",
    "tab\tand\x01control",
    "漢字 модель",
    "long " * 50,
)
