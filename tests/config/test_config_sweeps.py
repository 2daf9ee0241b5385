"""Names of the runs of a multirun."""

from __future__ import annotations

from hpcm_scale.config.compose import compose
from hpcm_scale.config.sweeps import name_run, sweeper_grids, swept_keys


def named(job: list[str], arguments: list[str], grids: tuple[dict, ...] = ()) -> tuple[str | None, str | None]:
    config = compose(job)
    name_run(config, job, swept_keys(arguments, grids))
    return config.run.sweep, config.run.dir


def test_named_after_what_is_swept():
    arguments = ["-m", "model=nano,micro", "train.steps=10", "objective.lmbda=0.0018,0.013"]
    job = ["model=nano", "train.steps=10", "objective.lmbda=0.013"]
    assert swept_keys(arguments) == ["model", "objective.lmbda"]
    folder = "runs/sweep_model_objective.lmbda/model=nano,objective.lmbda=0.013"
    assert named(job, arguments) == ("sweep_model_objective.lmbda", folder)


def test_jobs_of_a_sweep_have_folders_of_their_own():
    arguments = ["--multirun", "schedule=constant,paper", "train.seed=range(3)", "++train.batch_size=choice(4,8)"]
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
    arguments = ["-m", "data.shards='http://a/b','http://c/d'"]
    sweep, folder = named(["data.shards='http://a/b'"], arguments)
    assert sweep == "sweep_data.shards" and folder.count("/") == 2


def test_the_users_own_names_stay():
    arguments = ["-m", "model=nano,micro", "run.sweep=ladder"]
    assert named(["model=nano", "run.sweep=ladder"], arguments) == ("ladder", "runs/ladder/model=nano")
    arguments = ["-m", "model=nano,micro", "run.dir=here"]
    assert named(["model=nano", "run.dir=here"], arguments) == ("sweep_model", "here")


def test_one_job_is_no_sweep():
    assert named(["model=nano"], ["-m", "model=nano"]) == (None, None)


def test_what_a_launcher_is_told_names_no_run():
    arguments = ["-m", "model=nano,micro", "hydra/launcher=deepspeed", "hydra.launcher.gpus=[0,1]"]
    assert swept_keys(arguments) == ["model"]


def test_a_run_of_a_sweepers_own_grid_is_named_alike_alone_and_among_others():
    grids = ({"model": "nano,micro", "train.seed": "0"},)
    folder = "runs/sweep_model_train.seed/model=nano,train.seed=0"
    assert named(["model=nano", "train.seed=0"], [], grids) == ("sweep_model_train.seed", folder)
    assert named(["model=nano", "train.seed=0"], ["model=nano"], grids) == ("sweep_model_train.seed", folder)
    sweep, folder = named(["model=nano", "train.seed=0", "data.crop=256"], ["data.crop=128,256"], grids)
    assert sweep == "sweep_model_train.seed_data.crop" and folder.endswith("/model=nano,train.seed=0,data.crop=256")


def test_grids_are_the_sweepers_params_and_grids():
    assert sweeper_grids({"params": None}) == [{}]
    assert sweeper_grids({"params": {"a": "1,2"}, "grids": [{"b": 3}]}) == [{"a": "1,2"}, {"b": 3}]
