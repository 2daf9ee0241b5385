"""What a command continues, and what it refuses."""

from __future__ import annotations

import json
from copy import deepcopy
from enum import Enum
from functools import reduce
from pathlib import Path

import pytest

from hpcm_scale.config.compose import compose, from_yaml, to_dict, to_yaml
from hpcm_scale.config.schema import Config
from hpcm_scale.config.spec import RunSpec, run_directory
from hpcm_scale.config.sweeps import quoted
from hpcm_scale.errors import UserError
from hpcm_scale.sweeps.jobs import log_of
from hpcm_scale.training import start
from hpcm_scale.training.divergence import Divergence
from hpcm_scale.training.run_folder import RunFolder
from hpcm_scale.training.start import Resume, find_resume


def started(path, config: Config | None = None) -> RunFolder:
    folder = RunFolder(path)
    folder.record_start(to_yaml(config or compose(["model=nano"])))
    return folder


def checkpoint(folder: RunFolder, step: int, **changes) -> None:
    made = folder.checkpoints.of(step)
    made.folder.mkdir(parents=True)
    made.complete({}, {"step": step, "data": "digest", "tracker": {"images": 32 * step}} | changes)


def resumed(folder: RunFolder, config: Config, digest: str = "digest") -> Resume:
    return find_resume(folder, config, RunSpec.of(config, 1), digest)


def refused(folder: RunFolder, config: Config, digest: str = "digest") -> UserError:
    before = sorted(folder.path.rglob("*")) if folder.path.is_dir() else None
    with pytest.raises(UserError) as error:
        resumed(folder, config, digest)
    assert before == (sorted(folder.path.rglob("*")) if folder.path.is_dir() else None)
    assert "\n" not in str(error.value)
    return error.value


def test_a_new_run_takes_a_new_or_empty_folder(tmp_path):
    config = compose(["model=nano"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "stalled" / "stacks").mkdir(parents=True)  # before the first run had begun
    (tmp_path / "stalled" / ".lock").touch()
    for name in ("new", "empty", "stalled"):
        resume = resumed(RunFolder(tmp_path / name), config)
        assert resume.choice is None and resume.previous_steps is None and resume.step == 0
    assert not (tmp_path / "new").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    (tmp_path / "file").write_text("")
    for name in ("photos", "file"):
        assert refused(RunFolder(tmp_path / name), config).code == "not-a-run"


def directory(*overrides: str) -> Path:
    config = compose([*overrides])
    return run_directory(config.run, config.model.name)


def test_where_an_unnamed_run_goes():
    assert str(directory("model=nano")) == "runs/nano"
    assert str(directory("model=nano", "run.dir=a/b")) == "a/b"


@pytest.mark.parametrize("folder", ["x" * 249, "ä" * 125, "x" * 480, f"{'x' * 256}/run", "/".join(["x" * 200] * 18)])
def test_a_name_that_file_systems_do_not_take_is_refused(folder):
    with pytest.raises(UserError) as error:
        directory(f"run.dir={quoted(folder)}")
    assert error.value.code == "run-dir-too-long" and len(str(error.value)) < 200


@pytest.mark.parametrize("folder", ["x" * 248, "ä" * 124, f"{'x' * 255}/run", "/".join(["x" * 200] * 16)])
def test_the_longest_names_are_taken(folder, tmp_path, monkeypatch):
    """There is room for the files beside the folder and in it."""
    monkeypatch.chdir(tmp_path)
    run = directory(f"run.dir={quoted(folder)}")
    started(run)
    for beside in (log_of(run), run.with_name(f"{run.name}.sbatch"), run / "checkpoints"):
        beside.touch()


def test_the_same_command_goes_on_from_the_newest_checkpoint(tmp_path):
    config = compose(["model=nano"])
    folder = started(tmp_path / "run")
    assert resumed(folder, config).step == 0
    for step in (40, 80):
        checkpoint(folder, step, meter={"steps": 3})
    (folder.checkpoints.folder / "step_00000120").mkdir()  # interrupted: no marker
    resume = resumed(folder, config)
    assert resume.step == 80 and resume.choice.checkpoint.folder.name == "step_00000080"
    assert resume.choice.state["meter"] == {"steps": 3} and resume.previous_steps == config.train.steps


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and key != "options"
        result |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return result


FREE = ["steps", "stop_after", "micro_batch_size", "checkpoint_every", "keep_checkpoints", "keep_at", "keep_every"]
FREE += ["keep_best", "on_divergence", "loss_spike_factor", "max_skipped", "max_rollbacks", "max_hours"]
FREE += ["watchdog_timeout", "profile_steps"]
FREE = [f"train.{key}" for key in FREE]
FREE += [
    f"data.{key}"
    for key in (
        "shards",
        "workers",
        "prefetch",
        "cache",
        "retries",
        "timeout",
        "max_corrupt_samples",
        "pipe",
    )
]
FREE += [
    f"engine.{key}"
    for key in (
        "name",
        "zero_stage",
        "offload",
        "compile",
        "deterministic",
        "activation_checkpointing",
        "world_size",
        "init_timeout",
        "options",
    )
]
FREE += ["schedule.crop_boundaries"]
FREE += ["eval.images", "eval.every", "eval.limit", "eval.max_failed"]
FREE += [f"log.{key}" for key in ("every", "print_seconds", "wandb", "project", "images")]
FREE += ["run.dir", "run.sweep"]
OTHERS = {
    "model.family": "swin",
    "model.options": {"window": 4},
    "objective.distortion": "ms_ssim",
    "objective.likelihood": "public",
    "train.parametrisation": "mup",
    "train.ema": [0.1],
    "data.shards": "elsewhere",
    "data.cache": "elsewhere",
    "eval.images": "elsewhere",
    "run.dir": "elsewhere",
    "run.sweep": "other",
    "run.cooldown_of": "elsewhere",
    "train.keep_at": [40],
    "train.profile_steps": [40, 41],
    "train.on_divergence": "stop",
    "schedule.decay": 0.2,
    "schedule.crops": [512],
    "schedule.crop_boundaries": [0.8],
    "model.name": "other",
    "model.start": "random",
    "model.fusion": "none",
    "model.hyper_placement": "upstream",
    "engine.name": "accelerate",
    "engine.precision": "bf16",
    "engine.activation_checkpointing": "blocks",
    "objective.target": "vision_model",
    "optimizer.name": "muon",
    "optimizer.weight_decay": 0.1,
    "machine.receivers": ["random-vit"],
    "log.wandb": "disabled",
    "log.project": "other",
    "engine.options": {"seed": 1},
}


def other(key: str, value: object) -> object:
    """Some other value of the key's type."""
    if key in OTHERS:
        return OTHERS[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [entry / 2 if isinstance(entry, float) else entry + 1 for entry in value]
    return value / 2 if isinstance(value, float) else (value or 0) + 1


NANO = compose(["model=nano"])
KEYS = flat(to_dict(NANO))


@pytest.fixture(autouse=True, scope="module")
def read_once():
    """The same configuration is read for every key below, and takes longer than all else."""
    known: dict[bytes, Config] = {}

    def read(path: Path) -> Config:
        text = path.read_bytes()
        if text not in known:
            known[text] = from_yaml(path)
        return deepcopy(known[text])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(start, "from_yaml", read)
        yield


def changed(key: str, value: object) -> Config:
    """`NANO` with another value, which may be an enum's name."""
    config = deepcopy(NANO)
    *sections, last = key.split(".")
    section = reduce(getattr, sections, config)
    before = getattr(section, last)
    setattr(section, last, type(before)[value] if isinstance(before, Enum) else value)
    assert getattr(section, last) != before
    return config


@pytest.fixture(scope="module")
def run_at_40(tmp_path_factory) -> RunFolder:
    folder = started(tmp_path_factory.mktemp("runs") / "run")
    checkpoint(folder, 40)
    folder.weights_file.write_bytes(b"")
    return folder


@pytest.mark.parametrize("key", KEYS)
def test_what_may_change_when_a_run_goes_on(key, run_at_40):
    """Every key there is: those that would make it another run are refused by name, with both values."""
    config = changed(key, other(key, KEYS[key]))
    if key in FREE:
        assert resumed(run_at_40, config).step == 40
    else:
        error = refused(run_at_40, config)
        assert error.code == "other-run" and error.key.startswith(key)
        other_network = key.startswith(("model.", "machine.", "run.", "init_from"))
        assert (f"init_from={run_at_40.path} starts from its weights" in str(error)) != other_network


def test_a_run_without_weights_is_nothing_to_start_from(tmp_path):
    folder = started(tmp_path / "run")
    checkpoint(folder, 40)
    error = refused(folder, compose(["model=nano", "schedule.learning_rate=1"]))
    assert error.key == "schedule.learning_rate" and "init_from" not in str(error)


def test_a_setting_of_the_family_that_is_left_out_is_missed(tmp_path):
    """A smaller kernel would read the beginning of a larger one, from a checkpoint of flattened weights."""
    plain = ["model=nano", "model.family=convnext"]
    folder = RunFolder(tmp_path / "run")
    folder.record_start(to_yaml(compose([*plain, "+model.options.kernel=9"])))
    assert refused(folder, compose(plain)).key == "model.options.kernel"


def test_other_images_and_fewer_steps_are_refused(run_at_40):
    config = compose(["model=nano"])
    assert refused(run_at_40, config, digest="other").code == "other-training-images"
    shorter = compose(["model=nano", "train.steps=39"])
    assert refused(run_at_40, shorter).code == "fewer-steps-than-done"
    longer = compose(["model=nano", "train.steps=40"])
    assert resumed(run_at_40, longer).previous_steps == 2_000_000


def test_a_damaged_configuration_is_reported(tmp_path):
    folder = started(tmp_path / "run")
    folder.config_file.write_text("train: {steps: 10")
    assert refused(folder, compose(["model=nano"])).code == "damaged-yaml"


def test_the_folder_records_every_start(tmp_path):
    folder = started(tmp_path / "run")
    (folder.path / ".weights.safetensors.123.part").touch()  # of a process that was killed
    folder.record_start(to_yaml(compose(["model=nano", "train.steps=7"])))
    starts = json.loads(folder.environment_file.read_text())
    assert len(starts) == 2 and all("torch" in start["packages"] for start in starts)
    assert resumed(folder, compose(["model=nano", "train.steps=7"])).previous_steps == 7
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "environment.json"]


def test_divergences_are_noted_for_every_later_start(tmp_path):
    folder = started(tmp_path / "run")
    assert folder.divergences() == []
    noted = [Divergence(step, "its loss is not finite", 4 * step - 4, 4 * step - 1) for step in (7, 9)]
    for divergence in noted:
        folder.note_divergence(divergence)
    assert RunFolder(folder.path).divergences() == noted
