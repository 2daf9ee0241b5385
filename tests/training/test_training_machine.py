"""Training for machine receivers, stage after stage, and runs that start from the weights of others."""

from __future__ import annotations

import json

import pytest
import torch

from hpcm_scale.config.compose import compose
from hpcm_scale.errors import UserError
from hpcm_scale.model.weights import read_weights_file
from hpcm_scale.training.costs import task_costs, training_flops_per_image
from hpcm_scale.training.start import prepare
from hpcm_scale.training.task import check_origin, task_of

pytestmark = pytest.mark.launch

RECEIVER = ("machine.receivers=[random-vit]", "machine.pre_editor.tokens=random-vit")
VIEWER = ("objective.viewer=machine", *RECEIVER)
STAGES = ("experiment=machine", "stage=variable,pre_editor,joint", "machine.fixed_rate=fixed", *RECEIVER)
SHORT = ("train.steps=2", "schedule.warmup=0", "log.wandb=disabled")


@pytest.fixture(scope="module")
def stages(train, launch, shards):
    """Folders of the stages, of a fixed-rate model before them, and what the command said the second time."""
    train("fixed", *SHORT, "engine=zero2")
    command = ("model=nano", f"data.shards={shards}", "train.batch_size=4", "schedule.learning_rate=1e-3", *SHORT)
    for engine in ("engine=zero3", "engine=zero2"):
        result = launch(*command, *STAGES, engine)
        assert result.returncode == 0, result.stdout + result.stderr
    names = ("variable", "pre_editor", "joint")
    folders = {name: launch.folder / "runs" / "machine" / f"stage={name}" for name in names}
    return folders | {"fixed": launch.folder / "fixed"}, result.stdout


@pytest.fixture(scope="module")
def weights(stages):
    return {name: read_weights_file(folder) for name, folder in stages[0].items()}


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


def test_journals_tell_the_tokens(stages):
    for stage, folder in stages[0].items():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            assert ("train/token" in line) == ("train/rank" in line) == (stage in ("pre_editor", "joint"))
            assert line.get("train/token", 1) > 0


def test_finished_stages_are_passed_over(stages):
    assert "starting from" not in stages[1]


@pytest.mark.parametrize("codec", ["free", "frozen"])
def test_a_resumed_run_has_the_unbroken_journal_in_every_digit(codec, stages, train, launch):
    """A frozen codec is in no checkpoint, and comes back all the same."""
    overrides = (*VIEWER, "machine.edit=true", f"machine.freeze_codec={codec == 'frozen'}", "model.rate.levels=6")
    overrides = (*overrides, 'init_from="runs/machine/stage=pre_editor"', "engine=zero2", "train.steps=3")
    overrides = (*overrides, "train.checkpoint_every=1", "log.wandb=disabled")
    unbroken = train(f"unbroken_{codec}", *overrides)
    train(f"resumed_{codec}", *overrides, "train.stop_after=2")
    resumed = train(f"resumed_{codec}", *overrides)
    clock = ("time", "perf/")
    numbers = [
        [{k: v for k, v in line.items() if not k.startswith(clock)} for line in run] for run in (unbroken, resumed)
    ]
    assert numbers[0] == numbers[1]
    one, other = (read_weights_file(launch.folder / f"{name}_{codec}") for name in ("unbroken", "resumed"))
    assert all(torch.equal(one.state[name], tensor) for name, tensor in other.state.items())
    assert one.facts == other.facts


def test_a_frozen_codec_must_be_the_one_it_was(stages, train, launch, shards):
    stage = stages[0]["pre_editor"]
    weights = stages[0]["variable"] / "weights.safetensors"
    kept, config = weights.read_bytes(), (stage / "config.yaml").read_text()
    other = (stages[0]["joint"] / "weights.safetensors").read_bytes()
    command = ("model=nano", f"data.shards={shards}", "train.batch_size=4", "schedule.learning_rate=1e-3", *SHORT)
    try:
        weights.write_bytes(other)
        result = launch(*command, *STAGES, "stage=pre_editor", "engine=zero2", "train.steps=3")
    finally:
        weights.write_bytes(kept)
    assert result.returncode == 2 and "is not what runs/machine/stage=pre_editor was begun with" in result.stderr
    assert (stage / "config.yaml").read_text() == config


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["machine.edit=true"], "machine.edit needs objective.viewer=machine"),
        (["objective.viewer=machine"], "needs machine.receivers"),
        ([*VIEWER, "machine.edit=true", "machine.freeze_codec=true"], "needs a trained codec"),
        ([*VIEWER, "machine.freeze_codec=true"], "leaves nothing to train without machine.edit=true"),
        (["objective.viewer=machine", "machine.receivers=[random-vit,random-vit]"], "names one twice"),
        (["objective.viewer=machine", "machine.receivers=[random-vti]"], "random-vit"),
        ([*VIEWER, "machine.edit=true", "machine.pre_editor.tokens=clip"], "is not among machine.receivers"),
        ([*VIEWER, "machine.mse=0", "machine.token=0", "machine.rank=0"], "are all 0"),
        ([*VIEWER, "+machine.layers={random-vit/nose: 1}"], "there is no such layer"),
        (["model.rate.levels=2", "model.rate.lowest=0.1"], "the lowest below the highest"),
        (["model.rate.levels=0"], "model.rate.levels=0 must be at least 1"),
        (["init_from=nowhere"], "there are no weights at nowhere"),
        (["stage=joint", *RECEIVER], "there are no weights at runs/machine/stage=pre_editor"),
    ],
)
def test_mistakes_are_told_before_processes_meet(overrides, told, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        prepare(compose(["model=nano", f"data.shards={shards}", "train.batch_size=4", *overrides]), world_size=2)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_pre_editor_is_neither_dropped_nor_another(weights):
    file = weights["joint"]
    for overrides, told in (
        ([], "machine.edit=false would drop it"),
        ([*VIEWER, "machine.edit=true", "machine.pre_editor.blocks=2"], "has a pre-editor with machine.pre_editor="),
    ):
        with pytest.raises(UserError) as error:
            check_origin(compose(["model=nano", "model.rate.levels=6", *overrides]), file)
        assert told in str(error.value)


def test_costs_count_all_that_is_computed():
    from hpcm_scale.machine.receivers import receiver
    from hpcm_scale.model.shapes import on_meta

    plain = compose(["model=nano"])
    codec = training_flops_per_image(on_meta(plain.model), 256)
    assert task_costs(plain).training_flops_per_image == codec
    receivers = {"random-vit": receiver("random-vit")}
    trained = {"none": task_costs(compose(["model=nano", *VIEWER]), receivers)}
    for name in ("edit", "freeze_codec"):
        more = [*VIEWER, "machine.edit=true", *([f"machine.{name}=true"] if name != "edit" else [])]
        trained[name] = task_costs(compose(["model=nano", *more]), receivers)
    flops = {name: costs.training_flops_per_image for name, costs in trained.items()}
    assert codec < flops["none"] < flops["edit"]
    assert flops["edit"] - flops["freeze_codec"] == codec / 3  # no gradients of its weights
    assert [*trained["freeze_codec"].parameters_by_part] == ["pre_editor"]
    task = task_of(compose(["model=nano", *VIEWER, "machine.edit=true"]), None, receivers)
    assert trained["edit"].parameters == sum(weight.numel() for weight in task.module.parameters())
