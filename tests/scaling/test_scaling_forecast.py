from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from known_ladder import CROP, surface, write_run
from law_surfaces import SIZES, study_of, training

from hpcm_scale.commands import scaling
from hpcm_scale.errors import UserError
from hpcm_scale.scaling.analysis import Analysis, analyse, write_laws
from hpcm_scale.scaling.forecast import (
    describe_score,
    doubts,
    make_forecast,
    read_forecast,
    score,
    size_of,
    write_forecast,
)
from hpcm_scale.scaling.forecast_rate import forecast_bd_rate
from hpcm_scale.scaling.observations import study
from hpcm_scale.scaling.runs import find_runs, load_run

PAPER = Path(__file__).parents[2] / "docs" / "results" / "paper" / "journals"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new size of the ladder, annealed, on 600 steps."""
    return write_run(tmp_path_factory.mktemp("new") / "micro", "micro", 600, decay=0.2, seed=3)


def test_a_forecast_is_scored_by_its_run(ladder_analysis: Analysis, run: Path, tmp_path: Path) -> None:
    made = make_forecast(ladder_analysis, parameters=size_of("micro"), images=600 * 8)
    assert made.pixels == 600 * 8 * CROP**2
    assert made.loss == pytest.approx(surface(size_of("micro"), made.pixels), rel=0.01)
    write_forecast(made, tmp_path / "forecast.json")
    again = read_forecast(tmp_path / "forecast.json")
    assert again == made
    found = score(again, load_run(run))
    assert found.error == pytest.approx(made.loss / found.observed - 1)
    assert found.inside is (made.low <= found.observed <= made.high)
    assert f"off by {'+' if found.error > 0 else '−'}" in describe_score(again, found)
    with pytest.raises(UserError) as refused:
        write_forecast(made, tmp_path / "forecast.json")
    assert (refused.value.code, refused.value.key) == ("forecast-exists", "--out")


def test_a_loss_outside_the_interval_is_outside(ladder_analysis: Analysis, run: Path) -> None:
    made = make_forecast(ladder_analysis, parameters=size_of("micro"), images=600 * 8)
    away = replace(made, low=made.loss * 2, high=made.loss * 3, loss=made.loss * 2.5)
    assert score(away, load_run(run)).inside is False
    assert score(replace(made, low=None, high=None), load_run(run)).inside is None


@pytest.mark.parametrize(
    ("change", "code", "key"),
    [
        ({"recipe": {"optimizer.name": "soap"}}, "another-recipe", "optimizer.name"),
        ({"lmbda": 0.05}, "another-recipe", "objective.lmbda"),
        ({"parameters": 2e6}, "another-training", "RUN"),
        ({"pixels": 1e7}, "another-training", "RUN"),
    ],
)
def test_another_training_is_refused(ladder_analysis: Analysis, run: Path, change, code: str, key: str) -> None:
    made = make_forecast(ladder_analysis, parameters=size_of("micro"), images=600 * 8)
    with pytest.raises(UserError) as refused:
        score(replace(made, **change), load_run(run))
    assert (refused.value.code, refused.value.key) == (code, key)


def test_a_run_is_scored_when_it_is_done(ladder_analysis: Analysis, tmp_path: Path) -> None:
    made = make_forecast(ladder_analysis, parameters=size_of("micro"))
    for name, options in (("hot", {}), ("young", {"decay": 0.2, "done": 500})):
        with pytest.raises(UserError) as refused:
            score(made, load_run(write_run(tmp_path / name, "micro", 600, **options)))
        assert refused.value.code == "unfinished-run"


def test_a_forecast_of_a_size_is_for_the_data_of_its_law(ladder_analysis: Analysis, run: Path) -> None:
    made = make_forecast(ladder_analysis, parameters=size_of("micro"))
    assert made.pixels == pytest.approx(1000 * 8 * CROP**2)
    with pytest.raises(UserError) as refused:
        score(made, load_run(run))
    assert (refused.value.code, refused.value.key) == ("another-training", "RUN")


@pytest.mark.parametrize(
    "change",
    [{"loss": -1.0}, {"loss": None}, {"high": 0.1}, {"parameters": 0}, {"pixels": 0.0}, {"loss": 1e400}, {"law": 3}],
)
def test_a_forecast_that_was_changed_by_hand_is_refused(
    ladder_analysis: Analysis, tmp_path: Path, change: dict[str, float]
) -> None:
    file = tmp_path / "forecast.json"
    write_forecast(make_forecast(ladder_analysis, parameters=1e8), file)
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
    with pytest.raises(UserError) as refused:
        read_forecast(file)
    assert refused.value.code == "forecast-of-another-version"


def test_a_forecast_tells_how_far_it_is_from_the_trainings(ladder_analysis: Analysis) -> None:
    near, far = (make_forecast(ladder_analysis, parameters=4e6, images=images) for images in (5e4, 1e6))
    assert not any("times the largest" in doubt for doubt in doubts(ladder_analysis, near))
    assert any("times the largest" in doubt for doubt in doubts(ladder_analysis, far))
    assert set(ladder_analysis.laws[far.law].warnings) <= set(doubts(ladder_analysis, far))


def test_size_compute_or_both(ladder_analysis: Analysis) -> None:
    law, joint = (ladder_analysis.laws[name] for name in ("compute_optimal", "law_of_parameters_and_data"))
    pixels = 1e15 * 0.1 / (law.parameters["k"] * 3e6 ** law.parameters["kappa"])
    assert make_forecast(ladder_analysis, parameters=3e6, pflops=0.1).loss == joint.predict((3e6, pixels)).value
    assert make_forecast(ladder_analysis, pflops=0.1).loss == law.predict(0.1).value
    by_size = make_forecast(ladder_analysis, parameters=1e8)
    assert (by_size.loss, by_size.low, by_size.high) == pytest.approx(tuple(ladder_analysis.at_size(1e8)))
    few = replace(
        ladder_analysis,
        laws={name: each for name, each in ladder_analysis.laws.items() if "optimal" not in name and "and" not in name},
        refused={"law_of_parameters_and_data": "too few", "compute_optimal": "too few"},
    )
    assert make_forecast(few, pflops=0.1).loss == few.at_compute(0.1).value
    with pytest.raises(UserError) as refused:
        make_forecast(few, parameters=3e6, images=1e5)
    assert (refused.value.code, refused.value.key) == ("no-joint-law-for-forecast", "--laws")


def test_the_papers_promise_of_ten_billion_follows_from_its_published_step() -> None:
    """About −30 % against VTM on Kodak; −31 % from the step of HPCM-Base to HPCM-1B."""
    laws = analyse(study(find_runs([PAPER])))
    found = forecast_bd_rate([laws], size_of("10b"), "kodak/vtm-18", "kodak/hpcm-base", size_of("68m"))
    assert found.value == pytest.approx(-31, abs=0.5)
    assert "taken as that of every rate" in found.sentence
    with pytest.raises(UserError) as refused:
        forecast_bd_rate([laws], size_of("10b"), "kodak/vtm-18")
    assert (refused.value.code, refused.value.key) == ("no-reference", "--reference")


def test_laws_at_several_lambdas_move_each_point(tmp_path: Path) -> None:
    """A power law of loss with one share of rate everywhere: all rates change alike, and so does the BD-rate."""
    analyses, lines = [], ["bpp,psnr"]
    for lmbda, bpp, psnr in ((0.0018, 0.1, 28.0), (0.0067, 0.3, 32.0), (0.013, 0.5, 34.0), (0.0483, 1.0, 38.0)):
        noise = np.random.default_rng(int(1e4 * lmbda)).standard_normal(SIZES.size)
        losses = bpp * 2 * (SIZES / SIZES[-1]) ** -0.05 * np.exp(1e-3 * noise)
        runs = [
            training(size, 1e9, loss, lmbda=lmbda, bpp=loss / 2, psnr=psnr)
            for size, loss in zip(SIZES, losses, strict=True)
        ]
        analyses.append(analyse(replace(study_of(runs), lmbda=lmbda)))
        lines.append(f"{runs[-1].bpp},{psnr}")
    (tmp_path / "anchor.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = forecast_bd_rate(analyses, 10 * SIZES[-1], str(tmp_path / "anchor.csv"))
    assert found.low <= found.value <= found.high
    expected = 100 * (10 ** (-0.05 * 2) - 1)
    assert found.value == pytest.approx(expected, abs=3)
    assert found.low < expected < found.high

    # The quality is that of the trainings of the law, not of a shorter one of the same size.
    short = replace(analyses[0].observations[-1], run="short", psnr=20.0)
    longer = replace(analyses[0], observations=(*analyses[0].observations, short))
    assert forecast_bd_rate([longer, *analyses[1:]], 10 * SIZES[-1], str(tmp_path / "anchor.csv")) == found
    for given, code in (
        ((analyses[:2], None), "too-few-lambdas"),
        (([*analyses, analyses[0]], None), "too-few-lambdas"),
        ((analyses, "kodak/hpcm-base"), "reference-with-several-laws"),
        (([*analyses[1:], replace(analyses[0], recipe={"optimizer.name": "soap"})], None), "laws-of-several-recipes"),
    ):
        with pytest.raises(UserError) as refused:
            forecast_bd_rate(given[0], 10 * SIZES[-1], str(tmp_path / "anchor.csv"), given[1])
        assert refused.value.code == code


def test_the_commands(ladder_analysis: Analysis, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_laws(ladder_analysis, tmp_path / "laws.json")
    file = tmp_path / "forecast.json"
    scaling.main(["forecast", "--laws", str(tmp_path), "--size", "micro", "--images", "4800", "--out", str(file)])
    assert json.loads(file.read_text(encoding="utf-8"))["laws"]
    scaling.main(["score", str(file), str(run)])
    printed = capsys.readouterr().out
    assert "predicted eval/loss" in printed
    assert "micro: observed" in printed


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--size", "30m", "--anchor", "kodak/vtm-18", "--out", "x.json"], "--out has no effect with"),
        (["--size", "30m", "--anchor", "kodak/vtm-18", "--pflops", "3"], "--pflops has no effect with"),
        (["--size", "30m", "--reference-size", "3m"], "--reference-size has no effect without"),
        (["--anchor", "kodak/vtm-18"], "a forecast needs --size\n"),
        (["--size", "größe"], "--size größe is not a number"),
    ],
)
def test_options_that_do_not_go_together(
    ladder_analysis: Analysis, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], key: str
) -> None:
    write_laws(ladder_analysis, tmp_path / "laws.json")
    with pytest.raises(SystemExit) as ended:
        scaling.main(["forecast", "--laws", str(tmp_path), *options])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"hpcm: {key}")
