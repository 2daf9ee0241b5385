from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from known_ladder import SIZES
from odd_names import ODD_NAMES
from PIL import Image

from hpcm_scale.formatting import escaped, label
from hpcm_scale.scaling import figures
from hpcm_scale.scaling.figures import FIGURES, draw_figures
from hpcm_scale.scaling.figures.compute import draw_loss_against_compute
from hpcm_scale.scaling.figures.laws import budgets
from hpcm_scale.scaling.figures.style import COLOURS, paper, plain, round_numbers
from hpcm_scale.scaling.observations import Study
from hpcm_scale.scaling.report import report
from hpcm_scale.scaling.runs import find_runs


@pytest.fixture(scope="module")
def drawn(ladder_study, ladder_analysis, tmp_path_factory) -> Path:
    """The figures of the ladder."""
    folder = tmp_path_factory.mktemp("figures")
    assert list(draw_figures(ladder_study, ladder_analysis, folder)) == list(FIGURES)
    return folder


def words(svg: Path) -> set[str]:
    """The texts in a figure; matplotlib keeps each as a comment beside its outlines."""
    return {unescape(text).strip() for text in re.findall(r"<!--(.*?)-->", svg.read_text(), flags=re.DOTALL)}


@pytest.mark.launch
def test_every_figure_is_there_one_column_wide_and_twice_the_same(
    drawn, ladder_study, ladder_analysis, tmp_path
) -> None:
    files = sorted(path.name for path in drawn.iterdir())
    assert files == sorted(f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg"))
    for path in drawn.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.width == 1050  # 3.5 inches at 300 dpi
    draw_figures(ladder_study, ladder_analysis, tmp_path)
    assert all((tmp_path / name).read_bytes() == (drawn / name).read_bytes() for name in files)


def test_learning_curves_name_sizes_frontiers_and_law(drawn) -> None:
    texts = words(drawn / "learning_curves.svg")
    assert {"nano (211 k)", "small (17.2 M)", "whole frontier", "annealed frontier", "95 % of new trainings"} <= texts
    assert {"training compute C (PFLOPs)", "evaluation loss  λ·255²·MSE + bpp", "law: saturating power law"} <= texts
    svg = (drawn / "learning_curves.svg").read_text().lower()
    assert all(colour.lower() in svg for colour in COLOURS[: len(SIZES)])


def test_loss_against_parameters_shows_every_law_e_and_what_was_not_fitted(drawn, ladder_analysis) -> None:
    texts = words(drawn / "loss_against_parameters.svg")
    irreducible = ladder_analysis.laws["saturating_power_law_of_parameters"].parameters["E"]
    assert {"power law", "saturating power law (preferred)", "L(N, D), D = 524 Mpx"} <= texts
    assert f"irreducible loss E = {irreducible:.2f}" in texts
    assert any(text.startswith("not fitted") for text in texts)
    assert "100 M" in texts  # ten times the largest size


def test_ribbons_reach_as_far_as_is_asked(ladder_study, ladder_analysis) -> None:
    for extrapolate in (1, 10, 100):
        with paper() as figure:
            FIGURES["loss_against_parameters"].draw(figure, ladder_study, ladder_analysis, extrapolate)
            furthest = max(line.get_xdata().max() for line in figure.axes[0].lines if len(line.get_xdata()) == 200)
        assert furthest == pytest.approx(extrapolate * 17_170_667)


def test_a_figure_with_nothing_to_show_is_left_out_and_its_old_files_go(
    ladder_study, ladder_analysis, tmp_path
) -> None:
    for name in ("isoflop.png", "residuals.svg", "notes.txt"):
        (tmp_path / name).write_text("of other runs")
    alone = [curve for curve in ladder_study.curves if curve.model == "nano"]
    nothing = {"observations": (), "frontier": (), "frontier_annealed": (), "comparisons": {}, "diagnostics": {}}
    smaller = Study(ladder_study.metric, ladder_study.lmbda, alone, [], [])
    names = draw_figures(smaller, replace(ladder_analysis, **nothing), tmp_path)
    assert list(names) == ["learning_curves"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "learning_curves.png",
        "learning_curves.svg",
        "notes.txt",
    ]


def test_budgets_are_those_that_three_sizes_spent(ladder_study) -> None:
    chosen = budgets(ladder_study.curves)
    assert len(chosen) == 5
    for budget in chosen:
        sizes = {
            c.parameters
            for c in ladder_study.curves
            if c.pflops[0] <= budget * 1.001 and budget <= c.pflops[-1] * 1.001
        }
        assert len(sizes) >= 3
    assert budgets([]).size == 0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.4, 2.1, [1.4, 1.6, 1.8, 2.0]),
        (0.9, 40, [1, 2, 5, 10, 20]),
        (2e5, 2e8, [3e5, 1e6, 3e6, 1e7, 3e7, 1e8]),
        (1e-6, 1e9, None),
    ],
)
def test_round_numbers_are_few_and_inside(low, high, expected) -> None:
    found = round_numbers(low, high, 6)
    assert 2 <= len(found) <= 6
    assert low <= min(found) and max(found) <= high
    assert expected is None or found == pytest.approx(expected)


def test_numbers_on_axes() -> None:
    assert [plain(value) for value in (0.002, 0.5, 1234.0, 1e-6, 3e7)] == ["0.002", "0.5", "1,234", "10⁻⁶", "3·10⁷"]


@pytest.mark.launch
@pytest.mark.parametrize("names", [ODD_NAMES[:6], ODD_NAMES[6:12], (*ODD_NAMES[12:], *ODD_NAMES[:3])])
def test_names_are_drawn_as_they_are_spelled(
    names, ladder_runs, ladder_study, ladder_analysis, tmp_path, monkeypatch
) -> None:
    """The models of a ladder and its runs, called something odd."""
    monkeypatch.setattr(figures, "SUFFIXES", (".svg",))
    called = dict(zip(SIZES, names, strict=True))

    def renamed(each):
        return replace(each, run=f"{called[each.model]} {each.run}", model=called[each.model])

    curves, observations = ([*map(renamed, each)] for each in (ladder_study.curves, ladder_study.observations))
    analysis = replace(
        ladder_analysis,
        observations=tuple(observations),
        frontier=tuple(map(renamed, ladder_analysis.frontier)),
        frontier_annealed=tuple(map(renamed, ladder_analysis.frontier_annealed)),
    )
    study = replace(ladder_study, curves=curves, observations=observations)
    assert list(draw_figures(study, analysis, tmp_path)) == list(FIGURES)
    runs = [
        replace(run, name=name, config=run.config | {"model": {"name": name}})
        for name, run in zip(names[:2], find_runs([ladder_runs / "nano", ladder_runs / "micro"]), strict=True)
    ]
    draw_loss_against_compute(runs, tmp_path / "runs.svg")
    page = report(analysis, [])
    for name in names:
        shown = label(name).strip("\u200b ")
        for figure in ("learning_curves", *(["runs"] if name in names[:2] else [])):
            assert any(shown in text for text in words(tmp_path / f"{figure}.svg")), (name, figure)
        assert escaped(name).replace("|", "\\|") in page
