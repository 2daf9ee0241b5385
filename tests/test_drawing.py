"""Figures draw names as they are spelled."""

from __future__ import annotations

import re
import warnings
from html import unescape
from xml.dom import minidom

import matplotlib
import pytest
from odd_names import ODD_NAMES

from hpcm_scale.formatting import label, new_figure, save


def texts(svg) -> list[str]:
    """The texts in a figure; matplotlib keeps each as a comment beside its outlines."""
    document = svg.read_text(encoding="utf-8")
    minidom.parseString(document.encode())  # it is well-formed
    return [unescape(text).strip() for text in re.findall(r"<!--(.*?)-->", document, flags=re.DOTALL)]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_is_drawn_as_it_is_spelled(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of matplotlib: nothing is left out, no glyph is complained of
        with new_figure(figsize=(4, 3)) as figure:
            axes = figure.add_subplot()
            axes.plot([1, 2], label=label(name))
            axes.set_title(label(name))
            axes.annotate(label(name), (1, 1))
            axes.set_xticks([0], [label(name)])
            figure.legend()
            save(figure, tmp_path / "figure.svg")
            save(figure, tmp_path / "figure.png")
            assert [text.get_text() for text in figure.legends[0].get_texts()] == [label(name)]
    shown = [text.strip("\u200b") for text in texts(tmp_path / "figure.svg")]
    assert shown.count(label(name).strip("\u200b ")) == 4


def test_labels_are_short_single_lines_that_legends_keep():
    assert label("two\nlines\x01") == "two lines "
    assert label("a" * 100 + "end") == "…" + "a" * 40 + "end"
    assert label("_x").endswith("_x") and not label("_x").startswith("_")
    assert label("caf\udce9") == "caf "  # not UTF-8
    assert label("$plain$") == "$plain$"


def test_a_users_own_settings_of_matplotlib_do_not_change_that(tmp_path):
    with matplotlib.rc_context({"text.parse_math": True, "axes.formatter.use_mathtext": True}):
        with new_figure(style={"text.parse_math": True}) as figure:
            axes = figure.add_subplot(title="$x$")
            axes.plot([0, 1e9])  # its ticks have a power of ten
            save(figure, tmp_path / "figure.svg")
        assert matplotlib.rcParams["text.parse_math"]
    assert "$x$" in texts(tmp_path / "figure.svg")
    assert not [text for text in texts(tmp_path / "figure.svg") if "mathdefault" in text]


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        with new_figure(figsize=(3, 3)) as figure:
            figure.add_subplot().plot([1, 2])
            for suffix in ("svg", "pdf", "png"):
                save(figure, tmp_path / f"{name}.{suffix}")
    for suffix in ("svg", "pdf", "png"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_every_figure_is_made_here(project):
    """So that no other one reads names as mathematics."""
    makes = re.compile(r"\bFigure\(|pyplot|savefig")
    sources = [*(project / "hpcm_scale").rglob("*.py"), *(project / "benchmarks").rglob("*.py")]
    found = [path.name for path in sources if makes.search(path.read_text(encoding="utf-8"))]
    assert found == ["formatting.py"]
