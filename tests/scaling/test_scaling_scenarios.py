"""Runs that once made the analysis say something wrong: a right number, a refusal, or a caveat beside the headline."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from law_surfaces import AMOUNTS, SIZES, joint_surface, ladder, study_of, training

from hpcm_scale.errors import UserError
from hpcm_scale.model.ladder import compose_sized
from hpcm_scale.model.parameters import on_meta
from hpcm_scale.scaling.analysis import Analysis, analyse, rate_change, read_laws, write_laws
from hpcm_scale.scaling.filters import smoothed, without_spikes
from hpcm_scale.scaling.findings import caveats, headline, summary
from hpcm_scale.scaling.fit_data import of_compute
from hpcm_scale.scaling.observations import study
from hpcm_scale.scaling.plan import Setting, make_plan, print_plan
from hpcm_scale.scaling.report import print_summary, report
from hpcm_scale.scaling.runs import Records, Run, find_runs
from hpcm_scale.training.costs import training_flops_per_image

SATURATING = "saturating_power_law_of_parameters"
JOINT = "law_of_parameters_and_data"


@pytest.fixture(scope="module")
def every_run(ladder_runs) -> list[Run]:
    return find_runs([ladder_runs])


@pytest.fixture(scope="module")
def runs(every_run) -> list[Run]:
    """One annealed run of each of six sizes, as training left them."""
    return [run for run in every_run if run.name.endswith("-at-800")]


def changed(run: Run, *, name: str | None = None, at: Sequence[int] = (), factor: float = 1.0, **settings: Any) -> Run:
    """A run with its losses at some lines times a factor, and other settings, such as `train__seed`."""
    lines = list(run.records)
    for index in at:
        lines[index] |= {key: factor * value for key, value in lines[index].items() if key.endswith("/loss")}
    config = deepcopy(run.config)
    for key, value in settings.items():
        section, _, setting = key.partition("__")
        config[section][setting] = value
    return replace(run, name=name or run.name, records=Records(lines), config=config)


def in_place_of(runs: list[Run], *others: Run) -> list[Run]:
    """The runs, but for those of the same names."""
    return [run for run in runs if run.name not in {other.name for other in others}] + list(others)


def beside_the_headline(analysis: Analysis, capsys) -> str:
    """What stands before the first section of report.md; the same is in the terminal."""
    print_summary(analysis)
    printed = capsys.readouterr().out
    assert all(sentence in printed for sentence in summary(analysis))
    return report(analysis, []).partition("## Runs")[0].replace("\\", "")


# 1. An irreducible loss that five sizes hardly show: test_scaling_coverage.py.


def test_both_promises_are_printed_whichever_law_fits_better() -> None:
    for exponent, floor in ((0.15, 0.0), (0.15, 0.55), (0.3, 0.5)):
        sizes = np.geomspace(68e6, 1e9, 5)
        noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(5))
        losses = (floor + 2 * sizes**-exponent) * noise
        found = analyse(study_of([training(n, 1e9, y) for n, y in zip(sizes, losses, strict=True)]))
        assert "With an irreducible loss, E = " in headline(found)[2] and ", without one " in headline(found)[2]
        assert "an F test cannot tell" in headline(found)[2] or "an F test rejects E = 0" in headline(found)[2]
        assert found.at_size(1e10).low < floor + 2 * 1e10**-exponent < found.at_size(1e10).high


# 2. Diverged runs.


@pytest.mark.parametrize("lines", [1, 60])
def test_a_diverged_run_is_excluded_and_the_headline_is_that_of_the_others(runs, lines) -> None:
    last = next(run for run in runs if run.name == "mini-at-800")
    diverged = changed(last, at=range(len(last.records) - lines, len(last.records)), factor=30.0)
    found = study(in_place_of(runs, diverged))
    assert [sentence.split(":")[0:2] for sentence in found.excluded] == [
        ["mini-at-800 is excluded", " it has diverged"]
    ]
    others = analyse(study([run for run in runs if run.name != "mini-at-800"]))
    assert headline(analyse(found)) == headline(others)


def test_diverged_runs_alone_have_no_headline(runs) -> None:
    every = [changed(run, at=range(len(run.records) // 2, len(run.records)), factor=30.0) for run in runs]
    with pytest.raises(UserError, match="it has diverged") as refused:
        study(every)
    assert refused.value.code == "no-usable-runs"


# 3. Duplicates.


def test_a_copy_does_not_narrow_the_errors_and_is_named(runs) -> None:
    copies = [changed(run, name=f"{run.name}-copy") for run in runs[:3]]
    found = study([*copies, *runs])
    assert found.excluded == sorted(f"{run.name}-copy is excluded: it is a copy of {run.name}" for run in runs[:3])
    assert analyse(found).laws[SATURATING].standard_errors == analyse(study(runs)).laws[SATURATING].standard_errors


def test_two_runs_of_one_seed_are_both_used_and_named(runs, capsys) -> None:
    again = changed(runs[0], name="again", at=range(len(runs[0].records)), factor=1.004)
    found = analyse(study([*runs, again]))
    assert found.laws[SATURATING].points == 7
    assert f"{runs[0].name} and again have one model, seed and amount of data" in beside_the_headline(found, capsys)
    other_seed = changed(again, train__seed=1)
    assert caveats(analyse(study([*runs, other_seed]))) == []


# 4. N and D that do not determine L(N, D).


def test_size_and_data_that_cannot_be_told_apart_are_refused() -> None:
    generator = np.random.default_rng(0)

    def refusal(pairs) -> str:
        losses = [joint_surface(*pair) * np.exp(0.003 * generator.standard_normal()) for pair in pairs]
        found = analyse(study_of([training(*pair, loss) for pair, loss in zip(pairs, losses, strict=True)]))
        with pytest.raises(UserError) as refused:
            make_plan(found, Setting(), pflops=1)
        assert refused.value.code == "no-law-for-plan"
        return found.refused[JOINT]

    assert "and they differ by 1.1" in refusal([(n, 1e9 * d) for n in SIZES for d in (1, 1.0375, 1.075)])
    diagonal = [(n, 1e8 * n / SIZES[0]) for n in SIZES]
    assert "and they differ by 1:" in refusal(diagonal)
    assert "and they differ by 1:" in refusal([*diagonal, (SIZES[2], 10 * diagonal[2][1])])


# 5. Plans.


def recipe_of(command: str):
    return compose_sized([word for word in shlex.split(command) if "=" in word])


def test_the_command_has_the_recipe_of_the_law(every_run) -> None:
    chosen = {
        "train__batch_size": 16,
        "schedule__learning_rate": 3e-4,
        "schedule__warmup": 70,
        "optimizer__name": "muon",
        "model__start": "random",
        "objective__likelihood": "public",
        "train__parametrisation": "mup",
    }
    runs = [changed(run, **chosen) for run in every_run if run.name.startswith(("nano-", "micro-", "small-"))]
    made = make_plan(analyse(study(runs)), Setting(gpus=8, precision="fp32"), pflops=0.2)
    config = recipe_of(made.command)
    assert (config.train.batch_size, config.schedule.learning_rate, config.schedule.warmup) == (16, 3e-4, 70)
    assert (config.optimizer.name.value, config.model.start.value) == ("muon", "random")
    assert (config.objective.likelihood.value, config.train.parametrisation.value) == ("public", "mup")
    assert (config.schedule.decay, config.schedule.boundaries, config.data.crop) == (0.2, [], 256)
    assert not any("another recipe" in note for note in made.notes)


def test_beyond_the_largest_preset_the_pixels_spend_the_budget() -> None:
    """Trainings a hundred times as large as on the grid; the recommended model is larger than every preset of HPCM."""
    law = analyse(study_of(ladder(sizes=100 * SIZES[::2], amounts=10 * AMOUNTS)))
    made = make_plan(law, Setting(), pflops=3e5)
    assert made.parameters.value > 1.2e9
    by_rule = made.trainings[0]
    assert by_rule.model[0] == "model=hpcm"
    assert by_rule.parameters == pytest.approx(made.parameters.value, rel=0.07)
    for each in made.trainings:
        flops = training_flops_per_image(on_meta(compose_sized(each.model).model), 256)
        assert each.images * flops / 1e15 == pytest.approx(3e5, rel=0.01)  # the rest is the optimizer's
        assert each.images * 256**2 == pytest.approx(each.pixels, rel=1e-3)


def test_a_target_loss_near_the_irreducible_one_has_no_bound_or_is_refused(ladder_analysis) -> None:
    law = ladder_analysis.laws["compute_optimal"]
    floor, error = law.parameters["E"], law.standard_errors["E"]
    near = make_plan(ladder_analysis, Setting(), target_loss=floor + 2 * error)
    assert near.pflops.high == np.inf and near.command is None
    for target in (floor, floor - error, floor * (1 + 1e-12)):
        with pytest.raises(UserError) as refused:
            make_plan(ladder_analysis, Setting(), target_loss=target)
        assert refused.value.code in ("target-loss-below-irreducible", "unreachable-target-loss")


def test_only_sizes_of_one_architecture_are_recommended(ladder_analysis) -> None:
    """64m_phi is beside 65 million parameters, and another architecture."""
    law = ladder_analysis.laws["compute_optimal"]
    a = law.growth[0]
    budget = (64e6 / law.optimum(1.0).parameters) ** (1 / a)
    for pflops in budget * np.array([0.5, 1, 2]):
        made = make_plan(ladder_analysis, Setting(), pflops=float(pflops))
        names = [word for each in made.trainings for word in each.model]
        assert "model=64m_phi" not in names and not {"model=convnext", "model=swin"} & set(names)


def test_far_beyond_the_observed_there_is_an_interval_and_no_command(grid_analysis, capsys) -> None:
    made = make_plan(grid_analysis, Setting(), pflops=1e7 * max(each.pflops for each in grid_analysis.observations))
    assert made.command is None
    assert made.parameters.low < made.parameters.value < made.parameters.high
    print_plan(made)
    printed = capsys.readouterr().out
    assert "deepspeed" not in printed and "there is no command" in printed and "times the largest observed" in printed


# 6. The frontier.


def test_an_annealed_point_that_an_unannealed_run_beats_is_not_on_the_frontier() -> None:
    points = ladder(sizes=SIZES[:3])
    better = training(SIZES[2], AMOUNTS[0], 0.3, annealed=False, run="lower")
    found = analyse(study_of([*points, better]))
    beaten = {each.run for each in points if each.pflops >= better.pflops}
    assert beaten and not beaten & {point.run for point in found.frontier}
    assert not beaten & set(of_compute(found.frontier).runs)


# 7. From loss to rate.


def test_the_change_of_rate_is_exact_for_a_power_and_close_for_an_exponential() -> None:
    rate, lmbda, saved = np.geomspace(1e-3, 10, 400_001), 0.013, 0.7

    def best(distortion: np.ndarray, share: float) -> tuple[float, float]:
        loss = lmbda * distortion + share * rate
        return float(loss.min()), float(share * rate[np.argmin(loss)])

    for distortion, expected, tolerance in ((20 * rate**-0.8, -0.3, 1e-5), (900 * np.exp(-6 * rate), -0.308, 0.02)):
        (first, bpp), (second, _) = best(distortion, 1.0), best(distortion, saved)
        assert rate_change(second / first, first, bpp) == pytest.approx(expected, abs=tolerance)
    assert all(rate_change(ratio, 1.0, 0.1) >= -1 for ratio in (1e-300, 0.01, 0.5))


# 8. Caveats beside the headline.


def test_what_speaks_against_the_headline_stands_beside_it(runs, capsys) -> None:
    recipe = {
        "train__batch_size": 16,
        "engine__precision": "bf16",
        "schedule__learning_rate": 5e-4,
        "objective__likelihood": "public",
        "model__start": "random",
        "optimizer__name": "muon",
        "data__shards": "/data/others",
    }
    found = analyse(study(in_place_of(runs, changed(runs[0], **recipe))))
    shown = beside_the_headline(found, capsys)
    assert all(f"The runs differ in {key.replace('__', '.')} (" in shown for key in recipe)
    apart = [training(n, (1 + i) * 1e9, joint_surface(n, (1 + i) * 1e9)) for i, n in enumerate(SIZES)]
    assert "The sizes share no amount of training data" in beside_the_headline(analyse(study_of(apart)), capsys)
    hot = [replace(each, annealed=each.parameters > SIZES[0] + 1) for each in ladder()]
    found = analyse(study_of(hot))
    left_out = "xcluded from L(N), since their learning rate had not decayed: n200000"
    assert left_out in beside_the_headline(found, capsys)
    assert f"e{left_out}" in make_plan(found, Setting(), pflops=10).notes


def test_a_miss_of_nothing_is_no_caveat() -> None:
    """Noise-free: intervals of no width miss by the last digit."""
    exact = analyse(study_of([training(n, 1e9, 0.5 + 0.5 * (n / 2e5) ** -0.3) for n in SIZES]))
    assert not any("misses it by" in caveat for caveat in caveats(exact))


# 9. Numbers.


def test_equal_losses_are_valid_json(tmp_path) -> None:
    found = analyse(study_of([replace(each, loss=1.25) for each in ladder(sizes=SIZES[:3])]))
    write_laws(found, tmp_path / "laws.json")
    json.loads((tmp_path / "laws.json").read_text(), parse_constant=pytest.fail)
    assert read_laws(tmp_path).refused == found.refused != {}
    assert "are equal" in headline(found)[0]


@pytest.mark.parametrize("length", [1, 2])
def test_a_spike_at_the_end_does_not_move_it(length) -> None:
    compute = np.arange(1, 2001) * 0.01
    loss = (1 + compute**-0.3) * np.exp(0.05 * np.random.default_rng(0).standard_normal(2000))
    spiked = loss.copy()
    spiked[-length:] *= 30
    assert smoothed(compute, spiked)[-1] == pytest.approx(smoothed(compute, loss)[-1], rel=0.01)
    assert np.array_equal(without_spikes(loss), loss)
    stays = np.concatenate([loss, 30 * loss[-20:]])  # a divergence is no spike
    assert np.array_equal(without_spikes(stays)[-20:], stays[-20:])


def test_errors_of_coefficients_are_factors(ladder_analysis, capsys) -> None:
    """A ± of A would often include negative amplitudes."""
    text = report(ladder_analysis, []).replace("\\", "")
    print_summary(ladder_analysis)
    for shown in (text, capsys.readouterr().out):
        assert "A = 24.0 ×÷ 1.30" in shown and "k = 0.200 ×÷ 1.00" in shown
        assert not any(f"{name} = 24.0 ±" in shown for name in "AB")
    law = ladder_analysis.laws[JOINT]
    assert np.exp(law.standard_errors["A"] / law.parameters["A"]) == pytest.approx(1.30, abs=0.005)
