"""Markdown shows names as they are spelled."""

from __future__ import annotations

import pytest
from odd_names import ODD_NAMES

from hpcm_scale.formatting import code, escaped, markdown_table

markdown_it = pytest.importorskip("markdown_it")


def plain(text: str) -> str:
    """What a reader of Markdown sees of one paragraph: its text; markup of any kind is an error."""
    (_, inline, _) = markdown_it.MarkdownIt("commonmark").enable("strikethrough").parse(text)
    assert {token.type for token in inline.children} <= {"text", "text_special"}, text
    return "".join(token.content for token in inline.children)


def entry_point(name: str) -> str:
    return " ".join(name.splitlines())


@pytest.mark.parametrize("name", [*ODD_NAMES, "~~x~~", "a_b_c", "x*y*z", "\\*", "![a](b)"])
def test_an_escaped_name_is_read_as_it_is_spelled(name):
    assert plain(f"run {escaped(name)}") == f"run {entry_point(name)}".rstrip()
    assert "\n" not in escaped(name)


def test_ordinary_names_are_not_touched():
    for name in ("68m-at-800", "model=nano,seed=1", "sweep_model/a.b", "λ = 0.013, 95 % (n)"):
        assert escaped(name) == name


def test_dollars_do_not_begin_mathematics():
    assert escaped("$x$") == r"\$x\$"


@pytest.mark.parametrize("name", [*ODD_NAMES, "``", "`"])
def test_code_shows_backticks(name):
    (_, inline, _) = markdown_it.MarkdownIt("commonmark").parse(f"folder {code(name)}")
    before, span = inline.children
    assert (before.content, span.type, span.content) == ("folder ", "code_inline", entry_point(name))


def test_a_table_keeps_its_columns_whatever_its_cells_hold():
    rows = [[escaped(name), "1"] for name in ODD_NAMES]
    table = markdown_table(["name", "a|b"], rows)
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(table)
    cells = [token.content for token in tokens if token.type == "inline"]
    assert len(cells) == 2 + 2 * len(ODD_NAMES)
    assert cells[:2] == ["name", "a|b"] and cells[3::2] == ["1"] * len(ODD_NAMES)
    assert [plain(f"x{cell}") for cell in cells[2::2]] == [f"x{entry_point(name).strip()}" for name in ODD_NAMES]
