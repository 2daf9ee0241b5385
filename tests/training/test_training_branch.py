"""Cooldowns: what they continue, what they refuse."""

from __future__ import annotations

import json

import pytest

from hpcm_scale.commands.cooldown import main
from hpcm_scale.config.checks import check
from hpcm_scale.config.compose import compose, from_yaml, to_yaml
from hpcm_scale.config.schema import Config
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.errors import UserError
from hpcm_scale.training.checkpoints import Checkpoint
from hpcm_scale.training.cooldown import constant_rate_runs, cooldown
from hpcm_scale.training.optimizer import learning_rate
from hpcm_scale.training.run_folder import RunFolder
from hpcm_scale.training.start import Resume, find_resume


def constant_rate_run(path, *overrides: str, steps: tuple[int, ...] = (40, 80)) -> RunFolder:
    """A run folder with checkpoints that hold no weights."""
    folder = RunFolder(path)
    config = compose(["model=nano", "schedule=wsd", f"run.dir='{path}'", "train.steps=100", *overrides])
    folder.record_start(to_yaml(config))
    for step in steps:
        checkpoint(folder, step)
    return folder


def checkpoint(folder: RunFolder, step: int) -> Checkpoint:
    made = folder.checkpoints.of(step)
    made.folder.mkdir(parents=True)
    made.complete({}, {"step": step, "data": "digest", "tracker": {"images": 32 * step}})
    return made


def resumed(config: Config, digest: str = "digest") -> Resume:
    return find_resume(RunFolder(config.run.dir), config, RunSpec.of(config, 1), digest)


def rates(config: Config) -> list[float]:
    return [learning_rate(config.schedule, step, config.train.steps) for step in range(config.train.steps)]


@pytest.mark.parametrize("name", ["schedule=wsd", "schedule=paper", "schedule=constant"])
def test_a_cooldown_is_its_constant_rate_run_up_to_its_decay(name, tmp_path):
    folder = constant_rate_run(tmp_path / "model=nano", name, "schedule.warmup=7", "run.sweep=ladder")
    config = cooldown(folder.path, 40, 0.2)
    assert config.train.steps == 50 and config.run.sweep == "ladder"
    assert config.run.dir == str(tmp_path / "model=nano,cooldown_at=40,decay=0.2")
    original = from_yaml(folder.config_file)
    assert rates(config)[:41] == pytest.approx(rates(original)[:41], rel=1e-12)
    assert rates(config)[40:] == sorted(rates(config)[40:], reverse=True) and rates(config)[-1] < rates(config)[40] / 15
    assert rates(cooldown(folder.path, 80, 0.2))[:81] == pytest.approx(rates(original)[:81], rel=1e-12)


def test_steps_that_the_run_keeps_or_profiles_are_not_those_of_its_cooldown(tmp_path):
    folder = constant_rate_run(tmp_path / "trunk", "train.keep_at=[80]", "train.profile_steps=[70,72]")
    config = cooldown(folder.path, 40, 0.2)
    check(config, 1)
    assert config.train.keep_at == [] and config.train.profile_steps == []


def test_what_a_cooldown_starts_from(tmp_path):
    folder = constant_rate_run(tmp_path / "trunk")
    config = cooldown(folder.path, 40, 0.5, ["log.wandb=disabled", "data.shards=elsewhere"])
    assert config.data.shards == "elsewhere"
    resume = resumed(config)
    assert resume.step == 40
    assert resume.choice.checkpoint.folder == folder.checkpoints.folder / "step_00000040"
    started = RunFolder(config.run.dir)
    started.record_start(to_yaml(config))
    assert resumed(config).step == 40
    own = checkpoint(started, 60)
    assert resumed(config).choice.checkpoint.folder == own.folder


def test_a_damaged_checkpoint_has_no_cooldown(tmp_path):
    folder = constant_rate_run(tmp_path / "trunk")
    config = cooldown(folder.path, 40, 0.5)
    (folder.checkpoints.of(40).manifest).write_text("{")
    with pytest.raises(UserError, match=r"step_00000040 cannot be used .*; choose another step"):
        resumed(config)


@pytest.mark.parametrize(
    ("at", "decay", "changes", "code", "key"),
    [
        (50, 0.2, [], "no-cooldown-checkpoint", "--at"),
        (90, 0.2, [], "cooldown-after-decay", "--at"),
        (40, 0.0, [], "out-of-range", "--decay"),
        (40, 1.0, [], "out-of-range", "--decay"),
        (40, 0.01, [], "decay-too-short", "--decay"),
        (40, 0.2, ["train.sed=1"], "unknown-key", "train.sed"),
        (40, 0.2, ["train.seed=one"], "cooldown-change", "train.seed"),
    ],
)
def test_what_cannot_cool_down(at, decay, changes, code, key, tmp_path):
    folder = constant_rate_run(tmp_path / "trunk", steps=(40, 80, 90))
    with pytest.raises(UserError) as error:
        cooldown(folder.path, at, decay, changes)
    assert (error.value.code, error.value.key) == (code, key) and "\n" not in str(error.value)
    with pytest.raises(UserError) as error:
        cooldown(tmp_path / "nowhere", at, 0.2)
    assert error.value.code == "no-constant-rate-run"


def test_a_pattern_names_the_constant_rate_runs(tmp_path, monkeypatch):
    folder = constant_rate_run(tmp_path / "trunk")
    config = cooldown(folder.path, 40, 0.2)
    RunFolder(config.run.dir).record_start(to_yaml(config))
    (tmp_path / "sweep.json").write_text("{}")
    everything = sorted(map(str, tmp_path.iterdir()))
    assert len(everything) == 3 and constant_rate_runs([*everything, f"{folder.path}/"]) == [folder.path]
    with pytest.raises(UserError) as error:
        constant_rate_runs([config.run.dir, str(tmp_path / "sweep.json")])
    assert error.value.code == "only-cooldowns"
    (folder.path / "wandb").mkdir()
    monkeypatch.chdir(folder.path / "wandb")
    assert cooldown("..", 40, 0.2).run.dir == config.run.dir


@pytest.mark.parametrize(
    ("changes", "digest", "code", "key"),
    [
        (["train.seed=1"], "digest", "other-run", "train.seed"),
        (["objective.lmbda=0.1"], "digest", "other-run", "objective.lmbda"),
        ([], "other", "other-training-images", "data.shards"),
    ],
)
def test_a_cooldown_is_no_other_run(changes, digest, code, key, tmp_path):
    folder = constant_rate_run(tmp_path / "trunk")
    config = cooldown(folder.path, 40, 0.2, changes)
    with pytest.raises(UserError) as error:
        resumed(config, digest)
    assert (error.value.code, error.value.key) == (code, key)


@pytest.mark.launch
def test_cooldowns_train(train, launch, monkeypatch, capsys):
    """The first step is that of the constant-rate run to the bit; a second call of the command has nothing to do."""
    keys = ("schedule=wsd", "schedule.decay=0", "schedule.learning_rate=1e-3", "train.keep_at=[3]", "train.steps=5")
    options = ("engine=zero2", "train.keep_checkpoints=1")
    whole = train("trunk", *keys, *options)
    command = ("trunk", "--at", "3", "--decay", "0.5")
    result = launch(*command, module="hpcm_scale.commands.cooldown")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "cooldown of trunk from step 3" in result.stdout
    folder = launch.folder / "trunk,cooldown_at=3,decay=0.5"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 5, 6]
    for key in ("train/loss", "train/images", "compute/pflops", "train/learning_rate"):
        assert records[0][key] == whole[3][key]
    assert records[1]["train/learning_rate"] < whole[4]["train/learning_rate"]
    assert (folder / "weights.safetensors").is_file()
    monkeypatch.chdir(launch.folder)
    main(command)
    assert "finished" in capsys.readouterr().out
