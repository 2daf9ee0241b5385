from __future__ import annotations

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
from known_ladder import surface

from hpcm_scale.compute.tracker import TRAINING_FACTOR
from hpcm_scale.config.checks import check
from hpcm_scale.config.compose import compose, compose_model
from hpcm_scale.errors import UserError
from hpcm_scale.model.parameters import forward_flops_per_image, on_meta, parameter_count
from hpcm_scale.scaling.analysis import Analysis
from hpcm_scale.scaling.plan import Setting, make_plan, print_plan


@pytest.fixture(scope="module")
def without_n_d(ladder_analysis) -> Analysis:
    """The same without enough amounts of data for L(N, D)."""
    laws = {
        name: law
        for name, law in ladder_analysis.laws.items()
        if name not in ("law_of_parameters_and_data", "compute_optimal")
    }
    return replace(
        ladder_analysis,
        laws=laws,
        refused={"law_of_parameters_and_data": "L(N, D) needs 3 amounts of training data"},
    )


def test_the_best_size_is_that_of_a_search_over_all_sizes(ladder_analysis) -> None:
    made = make_plan(ladder_analysis, Setting(), pflops=0.5)
    law, joint = ladder_analysis.laws["compute_optimal"], ladder_analysis.laws["law_of_parameters_and_data"]
    sizes = np.geomspace(1e4, 1e9, 200_001)
    pixels = 0.5e15 / (law.parameters["k"] * sizes ** law.parameters["kappa"])
    loss = joint.predict((sizes, pixels)).value
    best = int(np.argmin(loss))
    assert made.optimum.parameters == pytest.approx(sizes[best], rel=1e-3)
    assert made.optimum.pixels == pytest.approx(pixels[best], rel=1e-3)
    assert made.optimum.loss == pytest.approx(loss[best], rel=1e-9)
    assert made.optimum.low < made.optimum.loss < made.optimum.high
    assert made.optimum.loss == pytest.approx(surface(sizes[best], pixels[best]), rel=0.01)


def test_presets_beside_it_spend_the_budget_at_their_own_cost(ladder_analysis) -> None:
    made = make_plan(ladder_analysis, Setting(images_in_set=1000, batch_size=16), pflops=0.5)
    smaller, larger = made.presets
    assert smaller.parameters <= made.optimum.parameters <= larger.parameters
    for preset in made.presets:
        model = on_meta(compose_model(preset.model))
        assert preset.parameters == parameter_count(model)
        flops = TRAINING_FACTOR * forward_flops_per_image(model, 256)
        assert preset.steps * 16 == preset.images
        assert preset.images * flops / 1e15 == pytest.approx(0.5, rel=16 / preset.images)
        assert preset.epochs == preset.images / 1000
    assert made.chosen == min(made.presets, key=lambda preset: preset.loss).model


def test_a_target_loss_is_met_by_its_own_budget(ladder_analysis) -> None:
    made = make_plan(ladder_analysis, Setting(), target_loss=1.4)
    assert made.optimum.loss == pytest.approx(1.4, rel=1e-9)
    assert make_plan(ladder_analysis, Setting(), pflops=made.pflops).optimum == made.optimum


def test_what_gpus_do_in_days() -> None:
    setting = Setting(gpus=64, gpu="h100", mfu=0.4)
    assert setting.pflops(7) == pytest.approx(64 * 989e12 * 0.4 * 7 * 86400 / 1e15)
    assert Setting(gpus=1, gpu="A100", mfu=1.0, precision="fp32").pflops(1) == pytest.approx(19.5e12 * 86400 / 1e15)
    with pytest.raises(UserError) as refused:
        Setting(gpu="abacus").pflops(1)
    assert (refused.value.code, refused.value.key) == ("unknown-gpu", "--gpu")


@pytest.mark.parametrize(("gpus", "launch"), [(4, "--num_gpus 4"), (24, "--hostfile hostfile")])
def test_the_command_composes_and_divides(ladder_analysis, gpus: int, launch: str) -> None:
    made = make_plan(ladder_analysis, Setting(gpus=gpus, crop=512), pflops=0.5)
    assert made.command.startswith(f"deepspeed {launch} --module hpcm_scale.train ")
    config = compose([word for word in shlex.split(made.command) if "=" in word])
    check(config, gpus)
    chosen = next(preset for preset in made.presets if preset.model == made.chosen)
    assert (config.model.name, config.train.steps, config.data.crop) == (made.chosen, chosen.steps, 512)
    assert config.train.batch_size == {4: 32, 24: 48}[gpus]
    assert config.objective.lmbda == ladder_analysis.lmbda
    assert ("48 images per step" in " ".join(made.notes)) == (gpus == 24)


def test_leaving_what_was_observed_is_flagged(ladder_analysis) -> None:
    inside = 0.95 * max(point.pflops for point in ladder_analysis.observations if point.model == "nano")
    assert make_plan(ladder_analysis, Setting(), pflops=inside).outside == ()
    far = " ".join(make_plan(ladder_analysis, Setting(), pflops=1e9).outside)
    assert all(words in far for words in ("the budget is", "the size is", "the training data is"))
    near = make_plan(ladder_analysis, Setting(), pflops=1e-6)
    assert near.outside[0].startswith("the budget is 1/")
    assert "is outside the presets" in near.notes[-1]


def test_without_l_of_n_and_d_the_frontier_gives_the_size_with_a_note(without_n_d, capsys) -> None:
    made = make_plan(without_n_d, Setting(), pflops=0.1)
    law = without_n_d.laws[without_n_d.preferred["compute"]]
    assert made.optimum.loss == law.predict(0.1).value
    assert all(preset.loss is None for preset in made.presets)
    sizes = [point.parameters for point in without_n_d.frontier_annealed]
    assert min(sizes) < made.optimum.parameters < max(sizes)
    assert "no compute-optimal law (L(N, D) needs 3 amounts" in made.notes[0]
    print_plan(made)
    assert "unknown" in capsys.readouterr().out


def test_what_cannot_be_planned_is_one_sentence(ladder_analysis, without_n_d) -> None:
    comparisons = without_n_d.comparisons
    edge = {name: replace(law, parameters=law.parameters | {"alpha": 4.0}) for name, law in without_n_d.laws.items()}
    saturating = {
        of: replace(each, preferred=f"saturating_power_law_of_{of}")
        for of, each in comparisons.items()
        if of != "parameters"
    }
    for analysis, setting, budget, code, key in (
        (ladder_analysis, {}, {"target_loss": 0.5}, "target-loss-below-irreducible", "--target-loss"),
        (replace(without_n_d, comparisons={}), {}, {"pflops": 1}, "no-law-for-plan", "--laws"),
        (replace(without_n_d, laws=edge, comparisons=saturating), {}, {"pflops": 1}, "no-law-for-plan", "--laws"),
        (ladder_analysis, {}, {"target_loss": float("nan")}, "invalid-target-loss", "--target-loss"),
        (ladder_analysis, {"crop": 300}, {"pflops": 1}, "crop-not-multiple", "--crop"),
        (ladder_analysis, {"gpus": 64, "batch_size": 32}, {"pflops": 1}, "batch-size-not-divisible", "--batch-size"),
    ):
        with pytest.raises(UserError) as refused:
            make_plan(analysis, Setting(**setting), **budget)
        assert (refused.value.code, refused.value.key) == (code, key)
    assert str(refused.value).endswith("use --batch-size 64")
    with pytest.raises(UserError, match="--crop=100 must be at least 128"):
        make_plan(ladder_analysis, Setting(crop=100), pflops=1)
    for wrong, option in ((Setting(mfu=0.0), "--mfu"), (Setting(level=1.0), "--level"), (Setting(gpus=0), "--gpus")):
        with pytest.raises(UserError, match=option):
            make_plan(ladder_analysis, wrong, pflops=1)
    with pytest.raises(UserError, match="budget in PFLOPs=-1 must be at least 1e-09"):
        make_plan(ladder_analysis, Setting(), pflops=-1)


def test_for_machines_and_for_people(ladder_analysis, capsys) -> None:
    made = make_plan(ladder_analysis, Setting(images_in_set=20_745), pflops=0.5)
    values = json.loads(made.to_json())
    assert values["chosen"] == made.chosen
    assert values["optimum"]["parameters"] == made.optimum.parameters
    print_plan(made)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == made.command
    assert f"{made.chosen} ←" in printed
    assert f"{made.optimum.loss:.4f} ({made.optimum.low:.4f}…{made.optimum.high:.4f})" in printed


@pytest.mark.parametrize("budget", [{"pflops": 1e-9}, {"pflops": 1e30}, {"target_loss": 5e-324}, {"target_loss": 1e6}])
@pytest.mark.parametrize(
    "setting",
    [
        {"gpus": 1_000_000, "mfu": 0.001, "level": 0.01},
        {"batch_size": 1_000_000, "mfu": 1.0, "level": 0.9999, "images_in_set": 1},
        {"crop": 16_384, "images_in_set": 10**9},
    ],
)
def test_the_ends_of_what_may_be_asked_are_a_plan_or_one_sentence(ladder_analysis, setting, budget, capsys):
    try:
        made = make_plan(ladder_analysis, Setting(**setting), **budget)
    except UserError as refused:
        assert "\n" not in str(refused)
    else:
        json.loads(made.to_json())
        print_plan(made)
