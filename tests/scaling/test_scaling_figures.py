from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known_ladder import SIZES
from odd_names import ODD_NAMES
from PIL import Image

from hpcm_scale.formatting import escaped, label
from hpcm_scale.scaling import figures
from hpcm_scale.scaling.analysis import COMPUTE_OPTIMAL, PARAMETERS_AND_DATA, Analysis
from hpcm_scale.scaling.figures import FIGURES, draw_figures
from hpcm_scale.scaling.figures.compute import draw_loss_against_compute
from hpcm_scale.scaling.figures.laws import budgets
from hpcm_scale.scaling.figures.style import COLOURS, paper, plain, round_numbers, with_gaps
from hpcm_scale.scaling.fit_data import losses_at
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


def test_learning_curves_name_sizes_frontier_and_law(drawn) -> None:
    texts = words(drawn / "learning_curves.svg")
    assert {"nano (211 k)", "small (17.2 M)", "frontier", "saturating power law", "95 % of new trainings"} <= texts
    assert {"annealed, on the frontier", "annealed, off the frontier"} <= texts
    assert {"training compute C (PFLOPs)", "evaluation loss  λ·255²·MSE + bpp"} <= texts
    svg = (drawn / "learning_curves.svg").read_text().lower()
    assert all(colour.lower() in svg for colour in COLOURS[: len(SIZES)])


def axes_of(name: str, study: Study, analysis: Analysis, extrapolate: float = 10) -> Any:
    """The first axes of a figure."""
    with paper() as figure:
        assert FIGURES[name].draw(figure, study, analysis, extrapolate)
        return figure.axes[0]


def line(axes: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """The curve with this label."""
    (found,) = (each for each in axes.lines if each.get_label() == text)
    return found.get_xdata(), found.get_ydata()


def test_learning_curves_draw_the_one_interval_of_the_analysis(ladder_study, ladder_analysis) -> None:
    axes = axes_of("learning_curves", ladder_study, ladder_analysis)
    compute, loss = line(axes, "saturating power law")
    assert loss == pytest.approx(ladder_analysis.at_compute(compute).value)
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    for edge in ladder_analysis.at_compute(compute)[1:]:
        assert np.isin(edge, corners[:, 1]).all()


def test_cooldowns_have_the_colour_of_their_size_and_a_thinner_line(ladder_study, ladder_analysis) -> None:
    axes = axes_of("learning_curves", ladder_study, ladder_analysis)
    drawn = list(zip(ladder_study.curves, axes.lines, strict=False))
    colours = {(curve.parameters, each.get_color()) for curve, each in drawn}
    assert len(colours) == len({size for size, _ in colours}) == len({colour for _, colour in colours}) == 6
    assert {("-at-" in curve.run, each.get_linewidth()) for curve, each in drawn} == {(False, 0.9), (True, 0.5)}


def test_loss_against_parameters_shows_both_laws_e_and_what_was_not_fitted(
    drawn, ladder_study, ladder_analysis
) -> None:
    texts = words(drawn / "loss_against_parameters.svg")
    irreducible = ladder_analysis.laws["saturating_power_law_of_parameters"].parameters["E"]
    assert {"power law", "saturating power law", f"irreducible loss E = {irreducible:.2f}"} <= texts
    assert {"fitted trainings", "other trainings", "100 M"} <= texts  # up to ten times the largest size
    axes = axes_of("loss_against_parameters", ladder_study, ladder_analysis)
    sizes, loss = line(axes, "saturating power law")
    assert loss == pytest.approx(ladder_analysis.at_size(sizes).value)
    assert len(line(axes, "fitted trainings")[0]) == 6
    assert len(line(axes, "other trainings")[0]) == len(ladder_study.observations) - 6
    assert len(axes.collections) == 1  # one band


def test_laws_reach_as_far_as_is_asked(ladder_study, ladder_analysis) -> None:
    for extrapolate in (1, 10, 100):
        axes = axes_of("loss_against_parameters", ladder_study, ladder_analysis, extrapolate)
        assert line(axes, "power law")[0].max() == pytest.approx(extrapolate * 17_170_667)


def test_a_law_without_interval_has_no_band(ladder_study, ladder_analysis) -> None:
    laws = {
        name: replace(law, covariance=None, standard_errors=None, residual_deviation=None)
        for name, law in ladder_analysis.laws.items()
    }
    analysis = replace(ladder_analysis, laws=laws)
    for name in ("learning_curves", "loss_against_parameters"):
        assert not axes_of(name, ladder_study, analysis).collections


def test_isoflop_draws_slices_of_the_law_over_the_losses_of_the_runs(ladder_study, ladder_analysis) -> None:
    axes = axes_of("isoflop", ladder_study, ladder_analysis)
    joint, optimal = (ladder_analysis.laws[name] for name in (PARAMETERS_AND_DATA, COMPUTE_OPTIMAL))
    k, kappa = optimal.parameters["k"], optimal.parameters["kappa"]
    chosen = budgets(ladder_study.curves)
    slices = [each.get_xydata() for each in axes.lines if each.get_linestyle() == ":"]
    stars = [each.get_xydata()[0] for each in axes.lines if each.get_marker() == "*"]
    for pflops, points, (best, lowest) in zip(chosen, slices, stars, strict=True):
        sizes, loss = points.T
        assert loss == pytest.approx(joint.predict((sizes, 1e15 * pflops / (k * sizes**kappa))).value)
        assert sizes[loss.argmin()] == pytest.approx(best, rel=0.05)
        assert loss.min() == pytest.approx(lowest, rel=1e-4)
    for pflops in chosen:
        for size, loss, annealed in losses_at(ladder_study.curves, pflops):
            faces = [
                each.get_markerfacecolor()
                for each in axes.lines
                if np.isclose(each.get_xdata(), size).any() and np.isclose(each.get_ydata(), loss, rtol=1e-9).any()
            ]
            assert faces and (faces[0] == "white") != annealed


def test_isoflop_without_a_law_joins_the_losses_and_claims_no_minimum(ladder_study, ladder_analysis) -> None:
    laws = {
        name: law for name, law in ladder_analysis.laws.items() if name not in (PARAMETERS_AND_DATA, COMPUTE_OPTIMAL)
    }
    axes = axes_of("isoflop", ladder_study, replace(ladder_analysis, laws=laws))
    assert not [each for each in axes.lines if each.get_marker() == "*" or each.get_linestyle() == ":"]
    assert not any("N*" in str(each.get_label()) for each in axes.lines)
    joined = [each for each in axes.lines if each.get_linestyle() == "-" and len(each.get_xdata()) >= 3]
    assert len(joined) == len(budgets(ladder_study.curves))


def test_slices_are_at_the_ends_of_annealed_runs_that_three_sizes_reach(ladder_study) -> None:
    chosen = budgets(ladder_study.curves)
    ends = [curve.pflops[-1] for curve in ladder_study.curves if curve.annealed[-1]]
    assert 3 <= len(chosen) <= 5
    assert chosen == sorted(chosen) and set(chosen) <= set(ends)
    assert all(len(losses_at(ladder_study.curves, each)) >= 3 for each in chosen)
    assert all(any(annealed for *_, annealed in losses_at(ladder_study.curves, each)) for each in chosen)
    assert budgets([]) == []


def test_residuals_of_the_law_of_both_are_drawn_over_both(drawn) -> None:
    texts = words(drawn / "residuals.svg")
    assert {"parameters N", "compute C (PFLOPs)", "training pixels D", "L(N, D)", "power law"} <= texts


def test_one_bad_run_does_not_flatten_a_figure(ladder_study, ladder_analysis) -> None:
    """It ends at 30 times the loss of its neighbours, and has not diverged from its own."""
    bad = ladder_study.curves[-1].run
    curves = [
        replace(each, smoothed=each.smoothed * 30, loss=each.loss * 30) if each.run == bad else each
        for each in ladder_study.curves
    ]
    observations = [
        replace(each, loss=each.loss * 30) if each.run == bad else each for each in ladder_study.observations
    ]
    study = replace(ladder_study, curves=curves, observations=observations)
    analysis = replace(ladder_analysis, observations=tuple(observations))
    for name, noun in (("learning_curves", "run"), ("loss_against_parameters", "training"), ("isoflop", None)):
        axes = axes_of(name, study, analysis)
        low, high = axes_of(name, ladder_study, ladder_analysis).get_ylim()
        assert axes.get_ylim()[1] < 1.2 * high and axes.get_ylim()[0] == pytest.approx(low, rel=0.1)
        if noun:
            assert f"1 {noun} outside this range" in [text.get_text() for text in axes.texts]


def test_a_line_has_a_gap_where_the_learning_rate_drops_at_once() -> None:
    compute = np.geomspace(1, 10, 400)
    loss = np.where(np.arange(400) < 300, 2.0, 1.5)
    at_once = np.where(np.arange(400) < 300, 1e-3, 1e-4)
    x, y = with_gaps(compute, loss, at_once)
    assert np.flatnonzero(np.isnan(y)).tolist() == np.flatnonzero(np.isnan(x)).tolist() == [300]
    assert np.array_equal(y[~np.isnan(y)], loss)
    for decay in (lambda part: 1 - part**0.5, lambda part: 1 - part):
        for lines in (5, 20, 400):  # of a decay over a fifth of the run
            part = np.arange(1, lines + 1) / lines
            assert np.isfinite(with_gaps(np.linspace(8, 10, lines), part, 1e-3 * decay(part))).all()
    assert np.isfinite(with_gaps(compute, loss, np.full(400, np.nan))).all()


def test_a_figure_with_nothing_to_show_is_left_out_and_its_old_files_go(
    ladder_study, ladder_analysis, tmp_path
) -> None:
    for name in ("isoflop.png", "residuals.svg", "notes.txt"):
        (tmp_path / name).write_text("of other runs")
    alone = [curve for curve in ladder_study.curves if curve.model == "nano"]
    nothing = {"observations": (), "frontier": (), "diagnostics": {}, "laws": {}}
    smaller = Study(ladder_study.metric, ladder_study.lmbda, alone, [], [])
    names = draw_figures(smaller, replace(ladder_analysis, **nothing), tmp_path)
    assert list(names) == ["learning_curves"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "learning_curves.png",
        "learning_curves.svg",
        "notes.txt",
    ]


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
