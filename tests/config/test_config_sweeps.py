"""Names of the runs of a multirun."""

from __future__ import annotations

import pytest

from hpcm_scale.config.compose import compose
from hpcm_scale.config.sweeps import LONGEST_NAME, name_run, refuse_hydra_folders, swept_keys
from hpcm_scale.errors import UserError


def named(job: list[str], arguments: list[str], grids: tuple[dict, ...] = ()) -> tuple[str | None, str | None]:
    config = compose(job)
    name_run(config.run, job, swept_keys({"grids": grids}, arguments))
    return config.run.sweep, config.run.dir


def test_named_after_what_is_swept():
    arguments = ["model=nano,micro", "train.steps=10", "objective.lmbda=0.0018,0.013"]
    job = ["model=nano", "train.steps=10", "objective.lmbda=0.013"]
    assert swept_keys({}, arguments) == ["model", "objective.lmbda"]
    folder = "runs/sweep_model_objective.lmbda/model=nano,objective.lmbda=0.013"
    assert named(job, arguments) == ("sweep_model_objective.lmbda", folder)


def test_jobs_of_a_sweep_have_folders_of_their_own():
    arguments = ["schedule=constant,paper", "train.seed=range(3)", "++train.batch_size=choice(4,8)"]
    jobs = [
        [f"schedule={schedule}", f"train.seed={seed}", f"++train.batch_size={batch}"]
        for schedule in ("constant", "paper")
        for seed in range(3)
        for batch in (4, 8)
    ]
    folders = {named(job, arguments)[1] for job in jobs}
    assert len(folders) == len(jobs)
    assert all(folder.count("/") == 2 for folder in folders)


def test_a_url_makes_one_folder():
    arguments = ["data.shards='http://a/b','http://c/d'"]
    sweep, folder = named(["data.shards='http://a/b'"], arguments)
    assert sweep == "sweep_data.shards" and folder.count("/") == 2


def test_values_that_differ_in_their_slashes_have_folders_of_their_own():
    arguments = ["data.shards=a_b/c,a/b_c,a_b_c"]
    folders = [named([f"data.shards={value}"], arguments)[1] for value in ("a_b/c", "a/b_c", "a_b_c")]
    assert len(set(folders)) == 3 and all(folder.count("/") == 2 for folder in folders)
    assert folders[2] == "runs/sweep_data.shards/data.shards=a_b_c"
    assert folders == [named([f"data.shards={value}"], arguments)[1] for value in ("a_b/c", "a/b_c", "a_b_c")]


@pytest.mark.parametrize("letter", ["a", "字"])
def test_long_names_are_cut_and_stay_apart(letter):
    values = [f'"{letter * 300}{end}"' for end in "12"]
    keys = ["data.shards", *(f"model.options.key{number}" for number in range(12))]
    arguments = [*(f"+{key}={','.join(values)}" for key in keys)]
    jobs = [[f"{'+' * (key != 'data.shards')}{key}={value}" for key in keys] for value in values]
    found = [named(job, arguments) for job in jobs]
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]
    for sweep, folder in found:
        runs, *names = folder.split("/")
        assert runs == "runs" and names[0] == sweep and len(names) == 2
        assert all(LONGEST_NAME - 4 < len(name.encode()) <= LONGEST_NAME for name in names)
    other_keys = arguments[:-1]
    assert named(jobs[0], other_keys)[0] != found[0][0]


@pytest.mark.parametrize("key", ["hydra.sweep.dir", "hydra.sweep.subdir", "hydra.run.dir", "++hydra.run.dir"])
def test_hydras_own_folders_are_refused(key):
    with pytest.raises(UserError, match=r"run\.dir=DIR.* run\.sweep=NAME"):
        refuse_hydra_folders(["model=nano", f"{key}=here"])
    refuse_hydra_folders(["model=nano", "hydra/launcher=deepspeed", "run.dir=here"])


def test_the_users_own_names_stay():
    arguments = ["model=nano,micro", "run.sweep=ladder"]
    assert named(["model=nano", "run.sweep=ladder"], arguments) == ("ladder", "runs/ladder/model=nano")
    arguments = ["model=nano,micro", "run.dir=here"]
    assert named(["model=nano", "run.dir=here"], arguments) == ("sweep_model", "here")


def test_one_job_is_no_sweep():
    assert named(["model=nano"], ["model=nano"]) == (None, None)


def test_options_of_a_launcher_name_no_run():
    arguments = ["model=nano,micro", "hydra/launcher=deepspeed", "hydra.launcher.gpus=[0,1]"]
    assert swept_keys({}, arguments) == ["model"]


def test_a_run_of_a_sweepers_own_grid_is_named_alike_alone_and_among_others():
    grids = ({"model": "nano,micro", "train.seed": "0"},)
    folder = "runs/sweep_model_train.seed/model=nano,train.seed=0"
    assert named(["model=nano", "train.seed=0"], [], grids) == ("sweep_model_train.seed", folder)
    assert named(["model=nano", "train.seed=0"], ["model=nano"], grids) == ("sweep_model_train.seed", folder)
    sweep, folder = named(["model=nano", "train.seed=0", "data.crop=256"], ["data.crop=128,256"], grids)
    assert sweep == "sweep_model_train.seed_data.crop" and folder.endswith("/model=nano,train.seed=0,data.crop=256")


def test_grids_are_the_sweepers_params_and_grids():
    assert swept_keys({"params": None}, []) == []
    assert swept_keys({"params": {"a": "1,2"}, "grids": [{"b": 3}]}, []) == ["a", "b"]
