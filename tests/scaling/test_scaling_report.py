from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from hpcm_scale.scaling.analysis import Analysis, analyse
from hpcm_scale.scaling.figures import FIGURES
from hpcm_scale.scaling.observations import Observation, Study
from hpcm_scale.scaling.report import report
from hpcm_scale.scaling.verdict import doubts, headline
from hpcm_scale.scaling.wording import count, significant, with_error


def observed(sizes, losses, *, annealed: bool = True) -> Study:
    """A study without curves: one training of each size."""
    rows = []
    for size, loss in zip(map(int, sizes), losses, strict=True):
        parts = {"g_a": size // 4, "g_s": size // 4, "hyper": size // 4, "context": size - 3 * (size // 4)}
        rows.append(
            Observation(
                f"run-{size}",
                f"m{size}",
                size,
                parts,
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
    return Study("eval/loss", 0.013, [], rows, ["broken is left out: its eval/loss was never finite"])


def believable(scatter: float = 0.002) -> Analysis:
    """A power law through eight sizes over two decades."""
    sizes = np.geomspace(2e5, 2e7, 8)
    noise = np.exp(scatter * np.random.default_rng(1).standard_normal(8))
    return analyse(observed(sizes, 3 * sizes**-0.05 * noise))


def test_a_law_that_holds_is_told_first_and_without_doubt() -> None:
    analysis = believable()
    assert doubts(analysis) == []
    opening = report(analysis, []).split("\n\n")[1]
    assert opening == headline(analysis)
    assert "10 times the largest size (200 M parameters)" in opening
    expected = 3 * 2e8**-0.05
    assert float(re.search(r"a loss of ([\d.]+)", opening).group(1)) == pytest.approx(expected, rel=0.01)
    assert "10× parameters: bitrate −" in opening


def test_the_first_lines_say_why_to_doubt_a_law(ladder_analysis) -> None:
    opening = report(ladder_analysis, []).split("\n\n")[1]
    assert opening.startswith("**Reasons to doubt what follows:**")
    assert "an F test rejects the power law without a floor" in opening
    assert "without a floor, ten times the largest size comes to" in opening


def test_a_law_that_misses_the_largest_size_is_doubted(ladder_analysis) -> None:
    line = ladder_analysis.laws["power_law_of_parameters"].name
    told = doubts(replace(ladder_analysis, preferred={**ladder_analysis.preferred, "parameters": line}))
    assert any(doubt.startswith("fitted without the largest size, the law misses it") for doubt in told)


def test_sizes_that_the_law_does_not_rest_on_do_not_count() -> None:
    study = observed(np.geomspace(2e5, 2e7, 6), np.geomspace(2, 1.6, 6))
    hot = [replace(each, annealed=index < 4) for index, each in enumerate(study.observations)]
    assert any(doubt.startswith("4 sizes are few") for doubt in doubts(analyse(replace(study, observations=hot))))


def test_a_law_that_more_data_have_already_beaten_is_doubted() -> None:
    study = observed(np.geomspace(2e5, 2e7, 6), [2, 1.9, 1.85, 1.82, 1.8, 1.79])
    more = replace(study.observations[2], run="more", pixels=5e9, images=80_000, pflops=1.0, loss=1.2)
    told = doubts(analyse(replace(study, observations=[*study.observations, more])))
    assert any(doubt.startswith("on 5.00 B pixels m") and "more data buys more" in doubt for doubt in told)


@pytest.mark.parametrize(
    ("study", "doubt"),
    [
        (observed([2e5, 1e6, 5e6], [2.0, 1.8, 1.7]), "3 sizes are few"),
        (observed(np.geomspace(2e5, 2e7, 6), np.geomspace(2, 1.6, 6) * 1.001, annealed=False), "no run was annealed"),
        (observed(np.geomspace(2e5, 2e7, 6), np.geomspace(1.6, 2, 6)), "does not fall with parameters"),
        (observed(np.geomspace(2e5, 2e7, 6), [2, 1.7, 2.05, 1.8, 2.1, 1.75]), "less than two standard errors"),
        (observed(np.geomspace(2e5, 6e5, 6), np.geomspace(2, 1.6, 6)), "span a factor of 3.0"),
        (observed([2e5, 1e7], [2.0, 1.8]), "no more trainings than parameters"),
    ],
)
def test_each_weakness_is_a_doubt(study: Study, doubt: str) -> None:
    analysis = analyse(study)
    assert any(doubt in told for told in doubts(analysis)), doubts(analysis)
    assert doubt.lower() in report(analysis, []).split("\n\n")[1].lower()


def test_without_any_law_the_report_says_so_and_shows_what_there_is() -> None:
    analysis = replace(
        believable(),
        laws={},
        preferred={},
        trust={},
        rate_gain=None,
        rate_gains={},
        refused={"power_law_of_parameters": "a power law needs two sizes"},
    )
    text = report(analysis, [])
    assert text.split("\n\n")[1].startswith("**These runs carry no law of parameters: a power law needs two sizes.**")
    assert "| run-200000 | m200000 | 200,000 |" in text


def test_the_report_holds_runs_laws_trust_figures_and_what_was_left_out(ladder_analysis) -> None:
    text = report(ladder_analysis, list(FIGURES))
    for point in ladder_analysis.observations:
        assert f"| {point.run} | {point.model} | {point.parameters:,} |" in text
    for law in ladder_analysis.laws.values():
        assert f"`{law.formula}`" in text
        for name in law.parameters:
            assert with_error(law.parameters[name], (law.standard_errors or {}).get(name)) in text
    assert "Pearson's r proves nothing" in text
    assert re.findall(r"!\[[^]]+\]\((.+?)\)", text) == [
        f"{name}.png" for name in ("learning_curves", "loss_against_parameters", "isoflop", "residuals", "parts")
    ]
    assert "| power law of parameters | 2 × | 34.3 M parameters |" in text
    assert "branches share their trunk: they are not independent" in text
    most = max(point.pflops for point in ladder_analysis.observations)
    assert f"Beyond 17.2 M parameters, 524 M pixels and {most:.4f} PFLOPs nothing was observed." in text
    assert "B (never trained)" in text
    assert (
        "- annealed trainings on 524 M pixels (power law of parameters; power law of parameters with a floor)." in text
    )
    assert "- broken is left out: its eval/loss was never finite." in report(believable(), [])
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
