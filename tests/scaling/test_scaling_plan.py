from __future__ import annotations

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
from known_ladder import surface
from law_surfaces import AMOUNTS, SIZES, ladder, study_of

from hpcm_scale.compute.tracker import TRAINING_FACTOR
from hpcm_scale.config.checks import check
from hpcm_scale.errors import UserError
from hpcm_scale.model.ladder import compose_sized
from hpcm_scale.model.parameters import forward_flops_per_image, on_meta, parameter_count
from hpcm_scale.scaling.analysis import analyse
from hpcm_scale.scaling.plan import Setting, make_plan, print_plan

JOINT = "law_of_parameters_and_data"


def config_of(command: str):
    return compose_sized([word for word in shlex.split(command) if "=" in word])


def test_the_best_size_is_that_of_a_search_over_all_sizes(ladder_analysis) -> None:
    made = make_plan(ladder_analysis, Setting(), pflops=0.5)
    law, joint = ladder_analysis.laws["compute_optimal"], ladder_analysis.laws[JOINT]
    sizes = np.geomspace(1e4, 1e9, 200_001)
    pixels = 0.5e15 / (law.parameters["k"] * sizes ** law.parameters["kappa"])
    loss = joint.predict((sizes, pixels)).value
    best = int(np.argmin(loss))
    assert made.parameters.value == pytest.approx(sizes[best], rel=1e-3)
    assert made.pixels.value == pytest.approx(pixels[best], rel=1e-3)
    assert made.loss.value == pytest.approx(loss[best], rel=1e-9)
    assert made.loss.low < surface(sizes[best], pixels[best]) < made.loss.high
    assert (made.parameters, made.pixels) == law.optimum_intervals(0.5)


def test_models_beside_it_spend_the_budget_at_their_own_cost(ladder_analysis) -> None:
    made = make_plan(ladder_analysis, Setting(images_in_set=1000, batch_size=16), pflops=0.5)
    nearest, other, by_rule = made.trainings
    assert min(nearest.parameters, other.parameters) <= made.parameters.value
    assert made.parameters.value <= max(nearest.parameters, other.parameters)
    assert by_rule.model[0] == "model=hpcm"
    assert by_rule.parameters == pytest.approx(made.parameters.value, rel=0.1)
    for training in made.trainings:
        model = on_meta(compose_sized(training.model).model)
        assert training.parameters == parameter_count(model)
        assert training.steps * 16 == training.images
        spent = training.images * TRAINING_FACTOR * forward_flops_per_image(model, 256) / 1e15
        assert spent == pytest.approx(0.5, rel=0.01)  # the rest is the optimizer's
        assert training.epochs == training.images / 1000
        size_and_data = (training.parameters, training.pixels)
        assert training.loss == ladder_analysis.laws[JOINT].predict(size_and_data)


def test_passes_over_the_data_are_noted_with_those_of_the_runs_if_known(ladder_analysis) -> None:
    def noted(images: int, unique: float | None = None) -> str:
        runs = tuple(replace(each, unique=unique) for each in ladder_analysis.observations)
        analysis = replace(ladder_analysis, observations=runs)
        made = make_plan(analysis, Setting(images_in_set=images), pflops=0.5)
        return " ".join(note for note in made.notes if note.startswith("the run passes over"))

    assert "times: repeated data" in noted(1000)
    assert "the runs of this law at most 2.0 times: repeated data" in noted(1000, 500 * 8 * 65536)
    assert not noted(10**7)


def test_a_target_loss_is_met_by_its_own_budget(ladder_analysis) -> None:
    made = make_plan(ladder_analysis, Setting(), target_loss=1.4)
    assert made.loss.value == pytest.approx(1.4, rel=1e-9)
    assert made.pflops == ladder_analysis.laws["compute_optimal"].compute_for(1.4)
    again = make_plan(ladder_analysis, Setting(), pflops=made.pflops.value)
    assert (again.parameters, again.loss, again.trainings) == (made.parameters, made.loss, made.trainings)
    assert again.pflops.low == again.pflops.high


def test_what_gpus_do_in_days() -> None:
    setting = Setting(gpus=64, gpu="h100", mfu=0.4)
    assert setting.pflops(7) == pytest.approx(64 * 989e12 * 0.4 * 7 * 86400 / 1e15)
    assert Setting(gpus=1, gpu="A100", mfu=1.0, precision="fp32").pflops(1) == pytest.approx(19.5e12 * 86400 / 1e15)
    with pytest.raises(UserError) as refused:
        Setting(gpu="abacus").pflops(1)
    assert (refused.value.code, refused.value.key) == ("unknown-gpu", "--gpu")


@pytest.mark.parametrize(("gpus", "launch"), [(4, "--num_gpus 4"), (24, "--hostfile hostfile")])
def test_the_command_composes_and_divides(ladder_analysis, gpus: int, launch: str) -> None:
    made = make_plan(ladder_analysis, Setting(gpus=gpus, crop=512), pflops=0.2)
    assert made.command.startswith(f"deepspeed {launch} --module hpcm_scale.train ")
    config = config_of(made.command)
    check(config, gpus)
    chosen = made.trainings[0]
    assert (f"model={config.model.name}",) == chosen.model
    assert (config.train.steps, config.data.crop, config.train.batch_size) == (chosen.steps, 512, {4: 8, 24: 24}[gpus])
    assert config.objective.lmbda == ladder_analysis.lmbda
    [differing] = [note for note in made.notes if note.startswith("the law is of another recipe")]
    assert "data.crop=512 (not 256), engine.precision=bf16 (not fp32)" in differing
    assert ("train.batch_size=24 (not 8)" in differing) == (gpus == 24)


def test_leaving_what_was_observed_is_flagged(ladder_analysis, grid_analysis) -> None:
    far = make_plan(grid_analysis, Setting(), pflops=1e9)
    assert all(words in " ".join(far.outside) for words in ("the budget is", "the size is", "the training data is"))
    assert far.command is None and "there is no command" in far.outside[-1]
    near = make_plan(ladder_analysis, Setting(), pflops=1e-6)
    assert near.outside[0].startswith("the budget is 1/")
    assert near.command is None


def test_the_command_of_the_rule_names_a_size(grid_analysis) -> None:
    made = make_plan(grid_analysis, Setting(), pflops=20)
    assert made.trainings[0].model[0] == "model=hpcm" and made.outside == ()
    assert parameter_count(on_meta(config_of(made.command).model)) == made.trainings[0].parameters


def test_what_cannot_be_planned_is_one_sentence(ladder_analysis) -> None:
    without = analyse(study_of(ladder(amounts=AMOUNTS[:2], sizes=SIZES[::2])))
    for analysis, setting, budget, code, key in (
        (ladder_analysis, {}, {"target_loss": 0.5}, "target-loss-below-irreducible", "--target-loss"),
        (without, {}, {"pflops": 1}, "no-law-for-plan", "--laws"),
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
    for wrong, option in ((Setting(mfu=0.0), "--mfu"), (Setting(gpus=0), "--gpus")):
        with pytest.raises(UserError, match=option):
            make_plan(ladder_analysis, wrong, pflops=1)
    with pytest.raises(UserError, match="budget in PFLOPs=-1 must be at least 1e-09"):
        make_plan(ladder_analysis, Setting(), pflops=-1)


def test_for_machines_and_for_people(ladder_analysis, capsys) -> None:
    made = make_plan(ladder_analysis, Setting(images_in_set=20_745), pflops=0.2)
    values = json.loads(made.to_json())
    assert values["parameters"] == list(made.parameters)
    assert values["trainings"][0]["model"] == list(made.trainings[0].model)
    print_plan(made)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == made.command
    first = made.trainings[0]
    assert f"{first.loss.value:.4f} ({first.loss.low:.4f}…{first.loss.high:.4f})" in printed
    assert all(each.model[-1] in printed for each in made.trainings)
    assert f"predicted loss {made.loss.value:.4f} (95 %: {made.loss.low:.4f}…{made.loss.high:.4f})" in printed


@pytest.mark.parametrize("budget", [{"pflops": 1e-9}, {"pflops": 1e30}, {"target_loss": 5e-324}, {"target_loss": 1e6}])
@pytest.mark.parametrize(
    "setting",
    [
        {"gpus": 1_000_000, "mfu": 0.001},
        {"batch_size": 1_000_000, "mfu": 1.0, "images_in_set": 1},
        {"crop": 16_384, "images_in_set": 10**9},
    ],
)
def test_the_ends_of_what_may_be_asked_are_a_plan_or_one_sentence(ladder_analysis, setting, budget, capsys):
    try:
        made = make_plan(replace(ladder_analysis, level=0.9999), Setting(**setting), **budget)
    except UserError as refused:
        assert "\n" not in str(refused)
    else:
        json.loads(made.to_json())
        print_plan(made)
