"""Every configuration in conf/ composes and can be trained; every mistake is reported in one line."""

from __future__ import annotations

import dataclasses

import pytest

from hpcm_scale.config.checks import check
from hpcm_scale.config.compose import (
    check_overrides,
    compose,
    compose_model,
    config_folder,
    from_yaml,
    model_from_dict,
    preset_names,
    to_dict,
    to_yaml,
)
from hpcm_scale.config.schema import Config, EngineName, Fusion, HyperPlacement, Precision, WandbMode
from hpcm_scale.errors import UserError
from hpcm_scale.model.ladder import compose_sized

GROUPS = sorted(path.name for path in config_folder().iterdir() if path.is_dir())
CHOICES = [f"{group}={name}" for group in GROUPS for name in preset_names(group)]


def test_the_groups_are_the_documented_ones():
    assert {"model", "data", "objective", "schedule", "engine", "experiment", "debug"} <= set(GROUPS)
    assert {"68m", "120m", "246m", "544m", "1b", "64m_phi", "90m"} <= set(preset_names("model"))
    assert {"nano", "micro", "mini", "small"} <= set(preset_names("model"))
    assert {"zero0", "zero1", "zero2", "zero3", "zero3_offload", "accelerate"} == set(preset_names("engine"))
    assert {"hpcm_1b", "quickstart"} <= set(preset_names("experiment"))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_checks_and_comes_back_from_yaml(choice, tmp_path):
    config = compose_sized([choice])
    for world_size in (1, 2, min(8, config.train.batch_size)):
        check(config, world_size)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(file) == config
    assert model_from_dict(to_dict(config)["model"]) == config.model


@pytest.mark.parametrize("name", preset_names("model"))
def test_a_model_is_named_after_its_file(name):
    assert compose_model(name).name == name


@pytest.mark.parametrize("experiment", preset_names("experiment"))
def test_every_experiment_goes_with_every_debug_preset(experiment):
    for debug in preset_names("debug"):
        check(compose_sized([f"experiment={experiment}", f"debug={debug}"]), 2)


def test_the_defaults_are_the_dataclasses():
    """conf/ and the schema do not contradict each other; enums, lists and nested classes are typed."""
    config = compose()
    assert config == Config()
    assert isinstance(config.engine.name, EngineName) and isinstance(config.model.fusion, Fusion)
    assert config.model.hyper_placement is HyperPlacement.aligned
    assert config.log.wandb is WandbMode.offline and config.engine.precision is Precision.fp32
    assert dataclasses.is_dataclass(config.model.prior_s3) and config.model.prior_s3.before == 3


def test_the_paper_experiment_is_the_papers_training():
    config = compose(["experiment=hpcm_1b"])
    train, schedule = config.train, config.schedule
    assert config.model.name == "1b" and config.objective.lmbda == 0.013 and config.data.crop == 256
    assert (train.steps, train.batch_size, train.clip_norm) == (2_000_000, 32, 1.0)
    drops = [round(boundary * train.steps) for boundary in schedule.boundaries]
    rates = [round(schedule.learning_rate * factor, 10) for factor in schedule.factors]
    assert drops == [1_600_000, 1_800_000, 1_900_000] and rates == [1e-4, 3e-5, 1e-5, 1e-6]


def test_the_command_line_has_the_last_word(tmp_path):
    overrides = ["experiment=quickstart", "model=micro", "train.steps=7", "data.shards='http://host/a?b=c'"]
    config = compose(
        [*overrides, "+engine.options.zero_optimization.stage3_max_live_parameters=5", "log.wandb=disabled"]
    )
    assert config.model.name == "micro" and config.train.steps == 7 and config.data.shards == "http://host/a?b=c"
    assert config.engine.options == {"zero_optimization": {"stage3_max_live_parameters": 5}}
    assert to_dict(config)["log"]["wandb"] == "disabled"
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert from_yaml(tmp_path / "config.yaml") == config


MISTAKES = {
    "modle=nano": ["modle", "did you mean model?"],
    "train.stesp=10": ["train.stesp", "did you mean train.steps?"],
    "+train.warmth=10": ["train.warmth", "train has steps, stop_after, batch_size"],
    "~train.stesp": ["train.stesp", "did you mean train.steps?"],
    "stesp=10": ["stesp", "did you mean train.steps?"],
    "trian.steps=10": ["trian.steps", "did you mean train.steps?"],
    "Train.Steps=10": ["Train.Steps", "did you mean train.steps?"],
    "schedule.lr=1": ["did you mean schedule.learning_rate? (schedule has learning_rate, boundaries, factors"],
    "+schedule.lr=1": ["+schedule.lr=1", "did you mean schedule.learning_rate?"],
    "train.lr=1": ["did you mean schedule.learning_rate? (train has steps"],
    "lr=1": ["did you mean schedule.learning_rate?"],
    "bs=4": ["did you mean train.batch_size?"],
    "schedule.warm=4": ["did you mean schedule.warmup?"],
    "images=null": ["did you mean log.images or eval.images?"],
    "evl.every=5": ["did you mean eval.every or log.every?"],
    "train.crop=256": ["did you mean data.crop? (train has"],
    "data.batch_size=4": ["did you mean train.batch_size? (data has shards"],
    "objective.lambda=1": ["did you mean objective.lmbda? (objective has lmbda, target, distortion, likelihood)"],
    "model.rate.level=2": ["did you mean model.rate.levels? (model.rate has levels, lowest, highest, reference)"],
    "train.steps.x=1": ["did you mean train.steps?"],
    "eval_every=5": ["did you mean eval.every?"],
    "train.eval_every=5": ["did you mean eval.every?"],
    "TRAIN.STEPS=5": ["did you mean train.steps?"],
    "model_size=1m": ["did you mean model.size?"],
    "engine.stage=2": ["did you mean engine.zero_stage?"],
    "model.heads=8": ["did you mean model.attention_heads?"],
    "train.ema_decay=0.9": ["did you mean train.ema? (train has"],
    "train.warmup_steps=9": ["did you mean schedule.warmup?"],
    "eval.freq=3": ["; eval has images, every, limit"],
    "objective.loss=mse": ["(objective has lmbda, target"],
    "log.interval=5": ["; log has every, print_seconds"],
    "=5": ["; the keys are in"],
    "train.zzz=1": ["train.zzz=1; train has steps"],
    "hydra=3": ["unknown key hydra"],
    "x" * 500 + "=1": ["unknown key xxx", "hpcm_scale/config/schema.py"],
    "schedule=consant": ["schedule=consant", "did you mean constant?"],
    "train.steps": ["train.steps cannot be parsed", "key=value"],
    "zzz=10": ["zzz", "hpcm_scale/config/schema.py"],
    "model=nanno": ["model=nanno", "did you mean nano?"],
    "engine=megatron": ["engine=megatron", "zero2"],
    "model=null": ["model=null", "68m"],
    "~model": ["~model", "68m"],
    "experiment=null": ["experiment=null", "hpcm_1b"],
    "model=[nano,micro]": ["model=[nano,micro]", "nano"],
    "train.steps=many": ["train.steps=many", "Integer"],
    "train.steps=1.5": ["train.steps=1.5", "Integer"],
    "data.crop=null": ["data.crop", "not Optional"],
    "data.flip=maybe": ["data.flip=maybe", "bool"],
    "optimizer.betas=3": ["optimizer.betas=3", "list"],
    "model.channels=[1,a,3]": ["model.channels=[1,a,3]", "Integer"],
    "model.prior_s3=3": ["model.prior_s3=3", "PriorConfig"],
    "engine.precision=fp8": ["engine.precision=fp8", "[fp32, bf16]"],
    "log.wandb=on": ["log.wandb=on", "[online, offline, disabled]"],
    "engine.options.foo=1": ["+engine.options.foo=1"],
    "model=nano,micro": ["model=nano,micro", "--multirun"],
    "nano": ["nano cannot be parsed", "key=value"],
    "data.shards=a=b": ["data.shards=a=b cannot be parsed", "quote"],
    "schedule.boundaries=[0.5": ["schedule.boundaries=[0.5 cannot be parsed"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_that_names_key_and_mend(mistake):
    with pytest.raises(UserError) as refused:
        compose(["model=nano", mistake] if "model" not in mistake else [mistake])
    text = str(refused.value)
    for part in MISTAKES[mistake]:
        assert part in text
    assert "\n" not in text and len(text) < 300


def test_a_sweep_is_checked_choice_by_choice():
    check_overrides(["model=nano,micro", "engine=choice(zero0,zero1)", "train.steps=10,20", "schedule=glob(*)"])
    with pytest.raises(UserError, match="did you mean micro"):
        check_overrides(["model=nano,micrro"])


@pytest.mark.parametrize(
    "sweep",
    [
        *("range(1,2000000000)", "range(5,1)", "range(0,1,0)", "range(0,nan)", "range(0,1e400)", "range(0,1,5e-324)"),
        *(f"range(0,{'9' * 400})", "range(10,0)", "range(20000)", "shuffle(range(20000))"),
    ],
)
def test_a_sweep_has_some_runs_and_not_too_many(sweep):
    with pytest.raises(UserError, match=r"at least 1 and at most 10,000") as refused:
        check_overrides(["model=nano,micro", f"train.seed={sweep}"])
    assert (refused.value.code, refused.value.key) == ("sweep-size", "train.seed")
    check_overrides(["model=nano,micro", "train.seed=range(5000)", "schedule.decay=range(0,1,1.5)"])
    with pytest.raises(UserError, match=r"with objective.lmbda=0.1,0.2 the number of runs"):
        check_overrides(["model=nano,micro", "train.seed=range(5000)", "objective.lmbda=0.1,0.2"])


@pytest.mark.parametrize("size", [0, -5, 10**30])
def test_batches_of_hydras_sweeper_hold_something(size):
    with pytest.raises(UserError, match=rf"^hydra.sweeper.max_batch_size={size} must be at least 1"):
        check_overrides([f"hydra.sweeper.max_batch_size={size}"])


def test_a_damaged_or_foreign_configuration_file_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    for text, code in (
        ("train: {steps: 10", "damaged-yaml"),
        ("train: {stesp: 10}", "other-version-yaml"),
        ("train: {steps: many}", "other-version-yaml"),
        ("- a\n- b\n", "other-version-yaml"),
        ("\x00\x01", "damaged-yaml"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError) as refused:
            from_yaml(file)
        assert refused.value.code == code and str(file) in str(refused.value) and "\n" not in str(refused.value)
