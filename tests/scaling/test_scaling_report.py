from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from hpcm_scale.formatting import count, escaped, significant, with_error
from hpcm_scale.scaling.analysis import Analysis, analyse
from hpcm_scale.scaling.figures import FIGURES
from hpcm_scale.scaling.findings import caveats, headline, summary
from hpcm_scale.scaling.observations import Observation, Study
from hpcm_scale.scaling.report import print_summary, report


def observed(sizes, losses, *, annealed: bool = True) -> Study:
    """A study without curves: one training of each size."""
    rows = []
    for size, loss in zip(map(int, sizes), losses, strict=True):
        rows.append(
            Observation(
                f"run-{size}",
                f"m{size}",
                size,
                0.013,
                0,
                5e8,
                8000,
                size * 5e-9,
                6.0 * size,
                loss,
                0.5,
                30.0,
                annealed,
                True,
            )
        )
    return Study("eval/loss", 0.013, [], rows, ["broken is excluded: its eval/loss was never finite"])


def believable(scatter: float = 0.002) -> Analysis:
    """A power law through eight sizes over two decades."""
    sizes = np.geomspace(2e5, 2e7, 8)
    noise = np.exp(scatter * np.random.default_rng(1).standard_normal(8))
    return analyse(observed(sizes, 3 * sizes**-0.05 * noise))


def test_a_law_that_holds_has_no_caveats() -> None:
    analysis = believable()
    assert caveats(analysis) == []
    opening = report(analysis, []).split("\n\n")[1]
    assert opening == " ".join(map(escaped, headline(analysis)))
    assert "Ten times the largest size (200 M parameters)" in opening
    expected = 3 * 2e8**-0.05
    assert float(re.search(r"a predicted loss of ([\d.]+)", opening).group(1)) == pytest.approx(expected, rel=0.02)
    assert "this changes the bitrate of m20000000 by −" in opening and "one λ is not a BD-rate" in opening
    assert report(analysis, []).split("\n\n")[2] == "## Runs"


def test_both_promises_and_caveats_stand_beside_the_headline(ladder_analysis, capsys) -> None:
    noted = replace(ladder_analysis, notes=("the runs differ in train.batch_size (8, 16)",))
    opening = report(noted, []).split("\n\n")[1:4]
    assert "With an irreducible loss, E = 1.5" in opening[0] and "without one 1.4" in opening[0]
    assert "an F test rejects E = 0 (p = 0.00" in opening[0]
    assert opening[1:] == ["**Caveats:**", "- The runs differ in train.batch_size (8, 16)."]
    print_summary(noted)
    printed = capsys.readouterr().out
    assert all(sentence in printed for sentence in summary(noted))
    assert summary(noted)[-1] == "Caveat: the runs differ in train.batch_size (8, 16)."
    assert "L(N, D): E = 0.9" in printed


def test_a_law_that_misses_the_largest_size_has_a_caveat() -> None:
    """A floor that begins at the largest size."""
    sizes = np.geomspace(2e5, 2e7, 8)
    losses = 3 * sizes**-0.05 * np.where(sizes > 1.9e7, 1.05, 1) * np.exp(1e-4 * np.arange(8) ** 2 % 3)
    found = caveats(analyse(observed(sizes, losses)))
    assert any(re.match(r"fitted without the largest size, the law misses it by −\d\.\d+ %", each) for each in found)


def test_sizes_that_the_law_does_not_rest_on_do_not_count() -> None:
    study = observed(np.geomspace(2e5, 2e7, 6), np.geomspace(2, 1.6, 6))
    hot = [replace(each, annealed=index < 4) for index, each in enumerate(study.observations)]
    assert any(
        caveat.startswith("there are only 4 sizes") for caveat in caveats(analyse(replace(study, observations=hot)))
    )


def test_a_law_above_a_training_with_more_data_has_a_caveat() -> None:
    study = observed(np.geomspace(2e5, 2e7, 6), [2, 1.9, 1.85, 1.82, 1.8, 1.79])
    more = replace(study.observations[2], run="more", pixels=5e9, images=80_000, pflops=1.0, loss=1.2)
    found = caveats(analyse(replace(study, observations=[*study.observations, more])))
    assert any(caveat.startswith("with 5.00 B pixels, m") and "data matters more" in caveat for caveat in found)


@pytest.mark.parametrize(
    ("study", "caveat"),
    [
        (observed([2e5, 1e6, 5e6], [2.0, 1.8, 1.7]), "there are only 3 sizes"),
        (
            observed(np.geomspace(2e5, 2e7, 6), np.geomspace(2, 1.6, 6) * 1.001, annealed=False),
            "no learning rate had decayed",
        ),
        (observed(np.geomspace(2e5, 2e7, 6), np.geomspace(1.6, 2, 6)), "does not fall with parameters"),
        (observed(np.geomspace(2e5, 2e7, 6), [2, 1.7, 2.05, 1.8, 2.1, 1.75]), "less than two standard errors"),
        (observed(np.geomspace(2e5, 6e5, 6), np.geomspace(2, 1.6, 6)), "span a factor of 3.0"),
        (observed([2e5, 1e7], [2.0, 1.8]), "the law has no interval"),
    ],
)
def test_each_weakness_is_a_caveat(study: Study, caveat: str) -> None:
    analysis = analyse(study)
    assert any(caveat in found for found in caveats(analysis)), caveats(analysis)
    assert caveat.lower() in report(analysis, []).split("\n\n")[3].lower()


def test_without_any_law_the_report_explains_it_and_shows_what_there_is() -> None:
    analysis = replace(
        believable(),
        laws={},
        diagnostics={},
        refused=dict.fromkeys(("power_law_of_parameters", "compute_optimal"), "a power law needs two sizes"),
    )
    text = report(analysis, [])
    assert text.split("\n\n")[1] == "These runs determine no law of parameters: a power law needs two sizes."
    assert "| run-200000 | m200000 | 200,000 |" in text


def test_the_report_holds_runs_laws_diagnostics_figures_and_exclusions(ladder_analysis) -> None:
    text = report(ladder_analysis, list(FIGURES))
    for point in ladder_analysis.observations:
        assert f"| {point.run} | {point.model} | {point.parameters:,} |" in text
    for law in ladder_analysis.laws.values():
        assert escaped(law.formula) in text
        for name in law.parameters:
            error = law.standard_errors[name]
            assert (
                (f"{name} = " in text and "×÷" in text)
                if name in "ABk"
                else with_error(law.parameters[name], error) in text
            )
    assert "Pearson's r proves nothing" in text
    assert re.findall(r"!\[[^]]+\]\((.+?)\)", text) == [
        f"{name}.png" for name in ("learning_curves", "loss_against_parameters", "isoflop", "residuals")
    ]
    assert "| 2 × N | 34.3 M parameters | 1." in text
    assert "cooldowns share their constant-rate run: points are dependent" in text
    assert re.search(r"N\* grows as C\^a with a = 0\.\d{3} \(95 %: 0\.\d{3}…0\.\d{3}\)", text)
    assert "B), extrapolated |" in text
    assert "- Annealed trainings on 524 M pixels (power law of parameters; saturating power law of parameters)." in text
    assert "- broken is excluded: its eval/loss was never finite." in report(believable(), [])
    assert "nan" not in text.lower().replace("nano", "")
    assert "None" not in text


def test_numbers_in_words() -> None:
    assert [count(value) for value in (999, 210_719, 999_999, 4_314_839, 1e9, 3.3e13)] == [
        "999",
        "211 k",
        "1.00 M",
        "4.31 M",
        "1.00 B",
        "33.0 T",
    ]
    assert [significant(value, 3) for value in (0, 0.0123, -2.5, 12345, 1.5e-7)] == [
        "0",
        "0.0123",
        "−2.50",
        "12,345",
        "1.50·10⁻⁷",
    ]
    assert [with_error(0.33124, 0.0121), with_error(1.5, None), with_error(6004.2, 812.0)] == [
        "0.331 ± 0.012",
        "1.500",
        "6,004 ± 812",
    ]
