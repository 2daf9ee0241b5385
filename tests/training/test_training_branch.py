"""Decay branches: what they continue, what they refuse."""

from __future__ import annotations

import json

import pytest

from hpcm_scale.commands.cooldown import main
from hpcm_scale.config.checks import check
from hpcm_scale.config.compose import compose, from_yaml
from hpcm_scale.config.schema import Config
from hpcm_scale.errors import UserError
from hpcm_scale.training.checkpoints import Checkpoint
from hpcm_scale.training.cooldown import branch, trunks
from hpcm_scale.training.optimizer import learning_rate
from hpcm_scale.training.run_folder import RunFolder


def trunk(path, *overrides: str, steps: tuple[int, ...] = (40, 80)) -> RunFolder:
    """A run folder with checkpoints that hold no weights."""
    folder = RunFolder(path)
    folder.write_facts(compose(["model=nano", "schedule=wsd", f"run.dir='{path}'", "train.steps=100", *overrides]))
    for step in steps:
        checkpoint(folder, step)
    return folder


def checkpoint(folder: RunFolder, step: int) -> Checkpoint:
    made = folder.checkpoints.of(step)
    made.folder.mkdir(parents=True)
    made.complete({}, {"step": step, "data": "digest", "tracker": {"images": 32 * step}})
    return made


def rates(config: Config) -> list[float]:
    return [learning_rate(config.schedule, step, config.train.steps) for step in range(config.train.steps)]


@pytest.mark.parametrize("name", ["schedule=wsd", "schedule=paper", "schedule=constant"])
def test_a_branch_is_its_trunk_up_to_its_decay(name, tmp_path):
    folder = trunk(tmp_path / "model=nano", name, "schedule.warmup=7", "run.sweep=ladder")
    config = branch(folder.path, 40, 0.2)
    assert config.train.steps == 50 and config.run.sweep == "ladder"
    assert config.run.dir == str(tmp_path / "model=nano,cooldown_at=40,decay=0.2")
    original = from_yaml(folder.config_file)
    assert rates(config)[:41] == pytest.approx(rates(original)[:41], rel=1e-12)
    assert rates(config)[40:] == sorted(rates(config)[40:], reverse=True) and rates(config)[-1] < rates(config)[40] / 15
    assert rates(branch(folder.path, 80, 0.2))[:81] == pytest.approx(rates(original)[:81], rel=1e-12)


def test_steps_that_its_trunk_keeps_or_profiles_are_not_those_of_a_branch(tmp_path):
    folder = trunk(tmp_path / "trunk", "train.keep_at=[80]", "train.profile_steps=[70,72]")
    config = branch(folder.path, 40, 0.2)
    check(config, 1)
    assert config.train.keep_at == [] and config.train.profile_steps == []


def test_what_a_branch_starts_from(tmp_path):
    folder = trunk(tmp_path / "trunk")
    config = branch(folder.path, 40, 0.5, ["log.wandb=disabled", "data.shards=elsewhere"])
    assert config.data.shards == "elsewhere"
    resume = RunFolder(config.run.dir).resume(config, "digest")
    assert resume.step == 40
    assert resume.choice.checkpoint.folder == folder.checkpoints.folder / "step_00000040"
    started = RunFolder(config.run.dir)
    started.write_facts(config)
    assert started.resume(config, "digest").step == 40
    own = checkpoint(started, 60)
    assert started.resume(config, "digest").choice.checkpoint.folder == own.folder


def test_a_damaged_checkpoint_is_not_branched_off(tmp_path):
    folder = trunk(tmp_path / "trunk")
    config = branch(folder.path, 40, 0.5)
    (folder.checkpoints.of(40).manifest).write_text("{")
    with pytest.raises(UserError, match=r"step_00000040 cannot be used .*; choose another step"):
        RunFolder(config.run.dir).resume(config, "digest")


@pytest.mark.parametrize(
    ("at", "decay", "changes", "says"),
    [
        (50, 0.2, [], "holds no checkpoint of step 50 (there are: 40, 80, 90); choose one of these, or train with"),
        (90, 0.2, [], "is in its own decay, which began at step 80; branch off before"),
        (40, 0.0, [], "--decay=0.0 must be greater than 0 and less than 1"),
        (40, 1.0, [], "--decay=1.0 must be greater than 0 and less than 1"),
        (40, 0.01, [], "--decay 0.01 at step 40 is a decay of 0 steps"),
        (40, 0.2, ["train.sed=1"], "unknown key train.sed in train.sed=1; did you mean train.seed?"),
        (40, 0.2, ["train.seed=one"], "cannot set train.seed=one (Value 'one'"),
    ],
)
def test_what_cannot_branch(at, decay, changes, says, tmp_path):
    folder = trunk(tmp_path / "trunk", steps=(40, 80, 90))
    with pytest.raises(UserError) as error:
        branch(folder.path, at, decay, changes)
    assert says in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="is not a run; name the folder of the run to branch off"):
        branch(tmp_path / "nowhere", at, 0.2)


def test_a_pattern_names_the_trunks_among_what_it_finds(tmp_path, monkeypatch):
    folder = trunk(tmp_path / "trunk")
    config = branch(folder.path, 40, 0.2)
    RunFolder(config.run.dir).write_facts(config)
    (tmp_path / "sweep.json").write_text("{}")
    everything = sorted(map(str, tmp_path.iterdir()))
    assert len(everything) == 3 and trunks([*everything, f"{folder.path}/"]) == [folder.path]
    with pytest.raises(UserError, match=r"no trunk among .*sweep\.json"):
        trunks([config.run.dir, str(tmp_path / "sweep.json")])
    (folder.path / "wandb").mkdir()
    monkeypatch.chdir(folder.path / "wandb")
    assert branch("..", 40, 0.2).run.dir == config.run.dir


@pytest.mark.parametrize(
    ("changes", "digest", "says"),
    [
        (["train.seed=1"], "digest", "holds a run with train.seed=0, not 1"),
        (["objective.lmbda=0.1"], "digest", "objective.lmbda=0.013, not 0.1"),
        ([], "other", "holds other photos"),
    ],
)
def test_a_branch_is_no_other_run(changes, digest, says, tmp_path):
    folder = trunk(tmp_path / "trunk")
    config = branch(folder.path, 40, 0.2, changes)
    with pytest.raises(UserError) as error:
        RunFolder(config.run.dir).resume(config, digest)
    assert says in str(error.value)


@pytest.mark.launch
@pytest.mark.parametrize(("engine", "processes"), [("accelerate", 1), ("zero2", 2)])
def test_branches_train(engine, processes, train, launch, monkeypatch, capsys):
    """For real: the first step is the trunk's own, in every digit; the command called again has nothing to do."""
    name = f"trunk_{engine}"
    keys = ("schedule=wsd", "schedule.decay=0", "schedule.learning_rate=1e-3", "train.keep_at=[3]", "train.steps=5")
    options = ("train.keep_checkpoints=1", "log.wandb=disabled")
    whole = train(name, f"engine={engine}", *keys, *options, processes=processes)
    command = (name, "--at", "3", "--decay", "0.5")
    result = launch(*command, module="hpcm_scale.commands.cooldown", processes=processes)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"branching off {name} at step 3" in result.stdout
    folder = launch.folder / f"{name},cooldown_at=3,decay=0.5"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 5, 6]
    for key in ("train/loss", "train/images", "compute/pflops", "train/learning_rate"):
        assert records[0][key] == whole[3][key]
    assert records[1]["train/learning_rate"] < whole[4]["train/learning_rate"]
    assert (folder / "weights.safetensors").is_file()
    if processes == 1:
        monkeypatch.chdir(launch.folder)
        main(command)
        assert "finished" in capsys.readouterr().out
