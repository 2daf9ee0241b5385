"""Sweepers that ask for the final loss of each run, as hydra-optuna-sweeper does, and fail_fast under them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from small_training import SMALL

import hpcm_scale.sweeps.launchers  # noqa: F401 (makes the package hydra_plugins)
from hpcm_scale.config.compose import compose, to_yaml
from hpcm_scale.errors import Fault
from hpcm_scale.sweeps.status import Follower

COMMON = (
    *SMALL,
    "train.batch_size=2",
    "train.steps=2",
    "engine=accelerate",
    "hydra/sweeper=asking",
    "run.sweep=search",
)
FOLDER = Path("runs/search")
results: list[float | Exception] = []


def value(result):
    """The result of a run for an optimizer."""
    try:
        return result.return_value
    except Fault as failure:
        return failure


class Asking(Sweeper):
    """Launches one batch of seeds after the other, and notes their results."""

    __module__ = "hydra_plugins.hpcm_scale_tests"

    def __init__(self, batches, params):
        self.batches = batches

    def setup(self, *, hydra_context, task_function, config):
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(hydra_context, task_function, config)

    def sweep(self, arguments):
        number = 0
        for seeds in self.batches:
            runs = [[*arguments, f"train.seed={seed}"] for seed in seeds]
            results.extend(map(value, self.launcher.launch(runs, number)))
            number += len(seeds)
        (Path(self.config.hydra.sweep.dir) / "best.txt").write_text(str(number))


@pytest.fixture
def search(train, shards, monkeypatch):
    """`search(*overrides)`: the command with `hydra/sweeper=asking`, which registers itself as an installed plugin."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    module = ModuleType(Asking.__module__)
    module.Asking = Asking
    monkeypatch.setattr(sys.modules["hydra_plugins"], "hpcm_scale_tests", module, raising=False)
    Plugins.instance().register(Asking)
    node = {"_target_": f"{Asking.__module__}.Asking", "batches": [[0], [1]], "params": {"train.seed": "0,1"}}
    ConfigStore.instance().store(group="hydra/sweeper", name="asking", node=node)
    results.clear()

    def call(*overrides: str) -> tuple[int, str, str]:
        before = dict(os.environ)
        try:
            return train("-m", *COMMON, f"data.shards={shards}", *overrides)
        finally:  # training has added RANK and the like
            os.environ.clear()
            os.environ.update(before)

    return call


def run(seed: int) -> Path:
    return FOLDER / f"train.seed={seed}"


@pytest.mark.launch
def test_an_optimizer_gets_the_final_losses(search):
    code, _, errors = search("hydra.sweeper.batches=[[0],[1,1]]")
    assert code == 0, errors
    losses = [Follower(run(seed)).look().loss for seed in (0, 1)]
    assert results == [losses[0], losses[1], losses[1]] and losses[0] != losses[1]
    assert (FOLDER / "best.txt").read_text() == "3"

    launcher = ("hydra/launcher=deepspeed", "hydra.launcher.jobs_at_once=2", "hydra.sweeper.batches=[[1,2]]")
    code, output, errors = search(*launcher)
    assert code == 0, errors
    assert results[3:] == [losses[1], Follower(run(2)).look().loss]
    assert output.count(": started on") == 1  # the other one is finished


@pytest.mark.launch
@pytest.mark.parametrize("fail_fast", [False, True])
def test_an_optimizer_learns_of_a_failed_run_unless_it_ends_the_sweep(search, shards, fail_fast):
    (run(0) / "metrics.jsonl").mkdir(parents=True)  # where its journal should be
    overrides = [override for override in COMMON if not override.startswith("hydra")]
    config = compose([*overrides, f"data.shards={shards}", "train.seed=0"])
    (run(0) / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    code, _, errors = search(f"hydra.launcher.fail_fast={fail_fast}")
    if fail_fast:
        assert code == 1 and results == [] and not run(1).exists(), errors
    else:
        assert code == 0 and isinstance(results[0], Fault) and results[1] == Follower(run(1)).look().loss, errors


@pytest.mark.parametrize(
    ("launcher", "variables", "reason"),
    [
        ("slurm", {}, "hydra/sweeper=asking needs the losses of runs, which hydra/launcher=slurm only submits"),
        ("in_turn", {"WORLD_SIZE": "2"}, "each process would optimize for itself with hydra/sweeper=asking"),
    ],
)
def test_launchers_without_results_are_refused(search, tmp_path, monkeypatch, launcher, variables, reason):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, output, errors = search(f"hydra/launcher={launcher}")
    assert code == 2 and output == "" and reason in errors
    assert list(tmp_path.rglob("*")) == []
