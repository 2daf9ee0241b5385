"""Training for machine receivers, stage after stage, and runs that start from the weights of others."""

from __future__ import annotations

import json

import pytest
import torch
from small_training import SMALL

from hpcm_scale.config.compose import compose
from hpcm_scale.errors import UserError
from hpcm_scale.model.weights import read_weights_file
from hpcm_scale.sweeps.jobs import Job, make_job, unfinished
from hpcm_scale.training.costs import TaskCosts, task_costs, training_flops_per_image
from hpcm_scale.training.post_hoc_ema import post_hoc_ema, save
from hpcm_scale.training.start import prepare
from hpcm_scale.training.task import check_origin, task_of

pytestmark = pytest.mark.launch

RECEIVER = ("machine.receivers=[random-vit]", "machine.pre_editor.tokens=random-vit")
VIEWER = ("objective.target=vision_model", *RECEIVER)
STAGES = ("experiment=machine", "stage=variable,pre_editor,joint", "machine.fixed_rate=fixed", *RECEIVER)
SHORT = ("train.steps=2", "train.ema=[0.1]", "schedule.warmup=0")


@pytest.fixture(scope="module")
def stages(train, launch, shards):
    """Folders of the stages, and of a fixed-rate model before them."""
    train("fixed", *SHORT, "engine=zero2")
    result = launch(*SMALL, f"data.shards={shards}", *SHORT, *STAGES, "engine=zero3")
    assert result.returncode == 0, result.stdout + result.stderr
    names = ("variable", "pre_editor", "joint")
    folders = {name: launch.folder / "runs" / "machine" / f"stage={name}" for name in names}
    return folders | {"fixed": launch.folder / "fixed"}


@pytest.fixture(scope="module")
def weights(stages):
    return {name: read_weights_file(folder) for name, folder in stages.items()}


def test_every_stage_starts_from_the_one_before(stages, weights):
    before = {"variable": "fixed", "pre_editor": "stage=variable", "joint": "stage=pre_editor"}
    spent = weights["fixed"].facts["total_pflops"]
    for stage, from_ in before.items():
        facts = weights[stage].facts
        assert facts["origin"]["path"].endswith(f"{from_}/weights.safetensors")
        spent += facts["pflops"]
        assert facts["total_pflops"] == pytest.approx(spent)
        assert facts["lmbda"] is None  # it has a range
        assert facts.get("receivers") == (None if stage == "variable" else ["random-vit"])


def test_a_frozen_codec_stays_to_the_bit_and_a_free_one_does_not(weights):
    frozen, free = weights["pre_editor"], weights["joint"]
    for name, tensor in weights["variable"].state.items():
        assert torch.equal(frozen.state[name], tensor), name
    assert any(not torch.equal(free.state[name], tensor) for name, tensor in frozen.state.items())
    moved = [
        name for name, tensor in free.pre_editor.state.items() if not torch.equal(tensor, frozen.pre_editor.state[name])
    ]
    assert "to_image.weight" in moved


def test_a_pre_editor_is_averaged_in_front_of_its_frozen_codec(stages, weights, launch, monkeypatch):
    """While it is trained, and afterwards: one checkpoint has the average of the length that was kept."""
    monkeypatch.chdir(launch.folder)
    kept, made = stages["pre_editor"] / "weights_ema_0.1.safetensors", launch.folder / "average.safetensors"
    save(made, post_hoc_ema(stages["pre_editor"], 0.1))
    own = weights["pre_editor"]
    for file in map(read_weights_file, (kept, made)):
        assert all(torch.equal(own.state[name], tensor) for name, tensor in file.state.items())
        assert any(
            not torch.equal(own.pre_editor.state[name], tensor) for name, tensor in file.pre_editor.state.items()
        )
        assert file.facts["ema"] == 0.1 and file.facts["origin"] == own.facts["origin"]
    ours, theirs = (read_weights_file(file).pre_editor.state for file in (kept, made))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_journals_tell_the_tokens(stages):
    for stage, folder in stages.items():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            assert ("train/token" in line) == ("train/rank" in line) == (stage in ("pre_editor", "joint"))
            assert line.get("train/token", 1) > 0


def test_finished_stages_are_passed_over(stages, launch, shards, monkeypatch):
    monkeypatch.chdir(launch.folder)
    jobs = [job_of(stage, shards, "train.steps=2") for stage in ("variable", "pre_editor", "joint")]
    assert unfinished(jobs, 2, in_turn=True) == []
    longer = [job_of(stage, shards, "train.steps=3") for stage in ("variable", "joint")]
    assert unfinished(longer, 2, in_turn=True) == longer
    with pytest.raises(
        UserError, match=r"pre_editor: the run uses the frozen codec of init_from=.*variable, which this"
    ):
        unfinished([job_of(stage, shards, "train.steps=3") for stage in ("variable", "pre_editor")], 2, in_turn=True)


def test_stages_that_follow_each_other_are_not_trained_at_once(stages, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fixed = f"machine.fixed_rate={stages['fixed']}"
    jobs = [job_of(stage, shards, "train.steps=2", fixed) for stage in ("variable", "pre_editor")]
    assert unfinished(jobs, 2, in_turn=True) == jobs
    with pytest.raises(UserError, match="which this command also trains; omit hydra/launcher"):
        unfinished(jobs, 2)


def job_of(stage: str, shards, *overrides: str) -> Job:
    chosen = [*SMALL, f"data.shards={shards}", *SHORT, "experiment=machine", f"stage={stage}", *RECEIVER]
    chosen += ["machine.fixed_rate=fixed", "engine=zero3"]
    chosen += ["+engine.options.zero_optimization.stage3_param_persistence_threshold=0", *overrides]
    return make_job(compose(chosen), chosen, ["stage"])


def test_a_frozen_codec_comes_back_when_its_run_goes_on(stages, weights, train, launch):
    """It is in no checkpoint. The journal is that of the stage, which ran without a break at another ZeRO stage."""
    overrides = (*VIEWER, "machine.edit=true", "machine.freeze_codec=true", "model.rate.levels=6", "train.steps=2")
    overrides = (*overrides, 'init_from="runs/machine/stage=variable"', "schedule=wsd")
    overrides = (*overrides, "schedule.warmup=0", "engine=zero2")
    train("resumed_machine", *overrides, "train.stop_after=1")
    resumed = train("resumed_machine", *overrides)
    stage = [json.loads(line) for line in (stages["pre_editor"] / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/loss"] for line in resumed] == pytest.approx([line["train/loss"] for line in stage], rel=1e-5)
    weights_of = read_weights_file(launch.folder / "resumed_machine")
    assert all(torch.equal(weights_of.state[name], tensor) for name, tensor in weights["variable"].state.items())
    assert weights_of.facts["origin"]["facts"] == weights["pre_editor"].facts["origin"]["facts"]


def test_a_frozen_codec_must_be_the_one_it_was(stages, launch, shards, monkeypatch):
    monkeypatch.chdir(launch.folder)
    file = stages["variable"] / "weights.safetensors"
    kept, longer = file.read_bytes(), job_of("pre_editor", shards, "train.steps=3").config
    assert prepare(longer, 2).origin.path == file.relative_to(launch.folder)
    try:
        file.write_bytes((stages["joint"] / "weights.safetensors").read_bytes())
        with pytest.raises(UserError):
            prepare(longer, 2)
        file.write_bytes((stages["fixed"] / "weights.safetensors").read_bytes())
        with pytest.raises(UserError) as error:
            prepare(longer, 2)
        assert error.value.code == "other-frozen-codec"
    finally:
        file.write_bytes(kept)


@pytest.mark.parametrize(
    ("overrides", "reported"),
    [
        (["machine.edit=true"], "machine.edit needs objective.target=vision_model"),
        (["objective.target=vision_model"], "needs machine.receivers"),
        ([*VIEWER, "machine.edit=true", "machine.freeze_codec=true"], "needs a trained codec"),
        ([*VIEWER, "machine.freeze_codec=true"], "without machine.edit=true trains no parameters"),
        (["objective.target=vision_model", "machine.receivers=[random-vit,random-vit]"], "lists a receiver twice"),
        (["objective.target=vision_model", "machine.receivers=[random-vti]"], "random-vit"),
        ([*VIEWER, "machine.edit=true", "machine.pre_editor.tokens=clip"], "is not among machine.receivers"),
        ([*VIEWER, "machine.mse=0", "machine.token_distortion_weight=0", "machine.token_rank_weight=0"], "are all 0"),
        ([*VIEWER, "+machine.layers={random-vit/nose: 1}"], "unknown layers, random-vit/nose"),
        (["model.rate.levels=2", "model.rate.lowest=0.1"], "must be less than model.rate.highest"),
        (["model.rate.levels=0"], "model.rate.levels=0 must be at least 1"),
        (["model.rate.levels=257"], "model.rate.levels=257 must be at least 1 and at most 256"),
        (["model.rate.levels=6", "objective.lmbda=0.1"], "is outside model.rate.lowest"),
        (["init_from=nowhere"], "there are no weights at nowhere"),
        (["stage=joint", *RECEIVER], "there are no weights at runs/machine/stage=pre_editor"),
    ],
)
def test_mistakes_are_reported_before_processes_meet(overrides, reported, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        prepare(compose(["model=nano", f"data.shards={shards}", "train.batch_size=4", *overrides]), world_size=2)
    assert reported in str(error.value) and "\n" not in str(error.value)


def test_a_pre_editor_is_neither_dropped_nor_another(weights):
    file = weights["joint"]
    for overrides, reported in (
        ([], "which machine.edit=false would drop"),
        ([*VIEWER, "machine.edit=true", "machine.pre_editor.blocks=2"], "has a pre-editor with machine.pre_editor="),
    ):
        with pytest.raises(UserError) as error:
            check_origin(compose([*SMALL, "model.rate.levels=6", *overrides]), file)
        assert reported in str(error.value)


def test_costs_count_all_that_is_computed():
    from hpcm_scale.machine.receivers import receiver
    from hpcm_scale.model.parameters import on_meta

    plain = compose(["model=nano"])
    codec = training_flops_per_image(on_meta(plain.model), 256)
    assert task_costs(plain.model, plain.machine, 256).training_flops_per_image == codec
    receivers = {"random-vit": receiver("random-vit")}

    def costs_of(*overrides: str) -> TaskCosts:
        config = compose(["model=nano", *overrides])
        return task_costs(config.model, config.machine, 256, receivers)

    trained = {"none": costs_of(*VIEWER)}
    for name in ("edit", "freeze_codec"):
        more = [*VIEWER, "machine.edit=true", *([f"machine.{name}=true"] if name != "edit" else [])]
        trained[name] = costs_of(*more)
    flops = {name: costs.training_flops_per_image for name, costs in trained.items()}
    assert codec < flops["none"] < flops["edit"]
    assert flops["edit"] - flops["freeze_codec"] == codec / 3  # no gradients of its weights
    assert [*trained["freeze_codec"].parameters_by_part] == ["pre_editor"]
    task = task_of(compose(["model=nano", *VIEWER, "machine.edit=true"]), None, receivers)
    assert trained["edit"].parameters == sum(weight.numel() for weight in task.module.parameters())
