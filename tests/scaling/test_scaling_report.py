from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from hpcm_scale.formatting import count, escaped, significant, with_error
from hpcm_scale.scaling.analysis import Analysis, analyse
from hpcm_scale.scaling.figures import FIGURES
from hpcm_scale.scaling.findings import caveats, headline
from hpcm_scale.scaling.observations import Observation, Study
from hpcm_scale.scaling.report import report


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


def test_a_law_that_holds_comes_first_without_caveats() -> None:
    analysis = believable()
    assert caveats(analysis) == []
    opening = report(analysis, []).split("\n\n")[1]
    assert opening == headline(analysis)
    assert "ten times the largest size (200 M parameters)" in opening
    expected = 3 * 2e8**-0.05
    assert float(re.search(r"a predicted loss of ([\d.]+)", opening).group(1)) == pytest.approx(expected, rel=0.01)
    assert "10× parameters: bitrate −" in opening


def test_the_first_lines_are_the_caveats(ladder_analysis) -> None:
    opening = report(ladder_analysis, []).split("\n\n")[1]
    assert opening.startswith("**Caveats:**")
    assert "an F test rejects E = 0" in opening
    assert "without irreducible loss, the predicted loss at ten times is" in opening


def test_a_law_that_misses_the_largest_size_has_a_caveat(ladder_analysis) -> None:
    line = ladder_analysis.laws["power_law_of_parameters"].name
    comparison = replace(ladder_analysis.comparisons["parameters"], preferred=line)
    found = caveats(replace(ladder_analysis, comparisons={**ladder_analysis.comparisons, "parameters": comparison}))
    assert any(caveat.startswith("fitted without the largest size, the law misses it") for caveat in found)


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
        (observed(np.geomspace(2e5, 2e7, 6), np.geomspace(2, 1.6, 6) * 1.001, annealed=False), "no run was annealed"),
        (observed(np.geomspace(2e5, 2e7, 6), np.geomspace(1.6, 2, 6)), "does not fall with parameters"),
        (observed(np.geomspace(2e5, 2e7, 6), [2, 1.7, 2.05, 1.8, 2.1, 1.75]), "less than two standard errors"),
        (observed(np.geomspace(2e5, 6e5, 6), np.geomspace(2, 1.6, 6)), "span a factor of 3.0"),
        (observed([2e5, 1e7], [2.0, 1.8]), "the law has no interval"),
    ],
)
def test_each_weakness_is_a_caveat(study: Study, caveat: str) -> None:
    analysis = analyse(study)
    assert any(caveat in found for found in caveats(analysis)), caveats(analysis)
    assert caveat.lower() in report(analysis, []).split("\n\n")[1].lower()


def test_without_any_law_the_report_explains_it_and_shows_what_there_is() -> None:
    analysis = replace(
        believable(),
        laws={},
        comparisons={},
        diagnostics={},
        rate_gains={},
        refused={"power_law_of_parameters": "a power law needs two sizes"},
    )
    text = report(analysis, [])
    assert text.split("\n\n")[1].startswith(
        "**These runs determine no law of parameters: a power law needs two sizes.**"
    )
    assert "| run-200000 | m200000 | 200,000 |" in text


def test_the_report_holds_runs_laws_diagnostics_figures_and_exclusions(ladder_analysis) -> None:
    text = report(ladder_analysis, list(FIGURES))
    for point in ladder_analysis.observations:
        assert f"| {point.run} | {point.model} | {point.parameters:,} |" in text
    for law in ladder_analysis.laws.values():
        assert escaped(law.formula) in text
        for name in law.parameters:
            assert with_error(law.parameters[name], (law.standard_errors or {}).get(name)) in text
    assert "Pearson's r proves nothing" in text
    assert re.findall(r"!\[[^]]+\]\((.+?)\)", text) == [
        f"{name}.png" for name in ("learning_curves", "loss_against_parameters", "isoflop", "residuals")
    ]
    assert "| power law of parameters | 2 × | 34.3 M parameters |" in text
    assert "cooldowns share their constant-rate run: points are dependent" in text
    most = max(point.pflops for point in ladder_analysis.observations)
    assert f"Nothing was observed beyond 17.2 M parameters, 524 M pixels and {most:.4f} PFLOPs." in text
    assert "B (extrapolated)" in text
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
