"""What a multirun is made of, and what is refused before anything starts."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from hpcm_scale.config.compose import compose, preset_names, to_yaml
from hpcm_scale.config.sweeps import job_overrides
from hpcm_scale.errors import UserError
from hpcm_scale.sweeps.jobs import make_job, quoted, read_plan
from hpcm_scale.sweeps.local import Share, free_port, shares, visible_gpus

ONLY_WRITE = ("hydra/launcher=slurm", "hydra.launcher.submit=false", "hydra.launcher.gpus_per_node=1")


def scripts(folder: Path) -> dict[str, list[str]]:
    """The overrides of each job that Slurm would be given, by the run's name, in order of names."""
    found = {}
    for path in sorted(folder.glob("*.sbatch")):
        words = shlex.split(path.read_text().partition("\nunder_slurm ")[2])
        found[path.stem] = words[words.index("hpcm_scale.train") + 1 :]
    return found


def test_devices_are_shared_out_disjointly():
    assert shares([4, 5, 6, 7, 8], 2, None, 64) == [Share(2, (4, 5)), Share(2, (6, 7))]
    assert shares([4, 5, 6, 7], 1, 2, 64) == [Share(1, (4,)), Share(1, (5,))]
    assert shares([], 2, None, 5) == [Share(2, ())] * 2
    assert shares([], 4, None, 2) == [Share(4, ())] and len(shares([], 1, 3, 2)) == 3
    assert Share(2, (4, 5)).arguments() == ["--include", "localhost:4,5"]
    assert Share(2, ()).arguments() == ["--num_gpus", "2"]


@pytest.mark.parametrize(
    ("arguments", "code", "key"),
    [
        (([0, 1], 4, None), "too-few-gpus", "hydra.launcher.gpus_per_job"),
        (([0, 1], 1, 3), "too-few-gpus", "hydra.launcher.gpus_per_job"),
        (([0, 0], 1, None), "duplicate-gpu", "hydra.launcher.gpus"),
    ],
)
def test_more_than_there_is_is_refused(arguments, code, key):
    with pytest.raises(UserError) as refused:
        shares(*arguments, 2)
    assert (refused.value.code, refused.value.key) == (code, key)


def test_gpus_are_those_that_cuda_visible_devices_leaves(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert visible_gpus() == []  # DS_ACCELERATOR=cpu, as in all tests
    monkeypatch.delenv("DS_ACCELERATOR")
    for value, gpus in {"2,5": [2, 5], "": [], "-1": []}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert visible_gpus() == gpus
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1234")
    with pytest.raises(UserError) as refused:
        visible_gpus()
    assert (refused.value.code, refused.value.key) == ("device-names", "CUDA_VISIBLE_DEVICES")


def test_ports_are_free_and_not_promised_to_others():
    taken = set()
    for _ in range(20):
        taken.add(free_port(taken))
    assert len(taken) == 20


@pytest.mark.parametrize("text", ["runs/a=b,c", 'a"b', "a'b", "a\\", 'a\\"b', "${x}", "a b", "null", "ä[(", 'a\\\\"'])
def test_any_name_goes_through_hydras_grammar(text):
    assert compose([f"run.dir={quoted(text)}"]).run.dir == text


def test_a_job_alone_has_the_configuration_that_it_has_among_others():
    overrides = ["model=nano", "train.seed=3", "run.sweep=mine", "+engine.options.zero_optimization.stage=0"]
    job = make_job(compose(overrides), overrides, ["model", "train.seed"])
    assert (job.config.run.dir, job.config.run.sweep) == ("runs/mine/model=nano,train.seed=3", "mine")
    assert compose([override for override in job.overrides if not override.startswith("hydra")]) == job.config
    assert job.overrides[-1] == "hydra.mode=RUN"


@pytest.mark.launch
def test_the_ladder_is_a_multirun_without_the_flag(train, shards, tmp_path):
    code, output, errors = train("experiment=ladder", f"data.shards={shards}", *ONLY_WRITE)
    assert code == 0, errors
    plan = read_plan(tmp_path / "runs" / "ladder")
    assert len(plan) >= 5 and all(0.1e6 < run.parameters < 20e6 for run in plan.values())
    written = scripts(tmp_path / "runs" / "ladder")
    assert written.keys() == plan.keys()
    for name, overrides in written.items():
        config = compose([override for override in overrides if override != "hydra.mode=RUN"])
        assert config.run.dir == f"runs/ladder/{name}" and config.run.sweep == "ladder"
        assert name == f"model={config.model.name}" and config.train.keep_at
        assert config.schedule.decay == 0 and config.schedule.boundaries == []  # only cooldowns decay
    assert output.count("sbatch runs/ladder/") == len(plan)

    (tmp_path / "runs" / "ladder" / "model=nano.sbatch").unlink()
    assert train("experiment=ladder", "model=nano", f"data.shards={shards}", *ONLY_WRITE)[0] == 0
    assert scripts(tmp_path / "runs" / "ladder")["model=nano"] == written["model=nano"]  # alone, it is the same run


@pytest.mark.launch
def test_the_paper_ladder_is_ten_runs(train, shards, tmp_path):
    code, _, errors = train("experiment=paper_ladder", f"data.shards={shards}", *ONLY_WRITE)
    assert code == 0, errors
    written = scripts(tmp_path / "runs" / "paper_ladder")
    configs = [compose([override for override in run if override != "hydra.mode=RUN"]) for run in written.values()]
    runs = {(config.model.name, config.objective.lmbda) for config in configs}
    sizes = {(size, 0.013) for size in ("68m", "120m", "246m", "544m", "1b")}
    assert runs == sizes | {("1b", lmbda) for lmbda in (0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483)}
    assert len(written) == 10 and {config.run.sweep for config in configs} == {"paper_ladder"}
    assert {(config.train.steps, config.train.batch_size) for config in configs} == {(2_000_000, 32)}


def test_the_command_line_narrows_grids_and_no_run_comes_twice():
    grids = [{"model": "nano,micro", "train.seed": 0}, {"model": "micro", "train.seed": "0,1"}]

    def jobs(*arguments: str, batch: int | None = None) -> list[list[list[str]]]:
        return job_overrides({"grids": grids, "max_batch_size": batch}, arguments)

    nano, micro, second = (
        ["model=nano", "train.seed=0"],
        ["model=micro", "train.seed=0"],
        ["model=micro", "train.seed=1"],
    )
    assert jobs() == [[nano, micro, second]]
    assert jobs(batch=2) == [[nano, micro], [second]]
    assert jobs("model=micro") == [[micro, second]]
    assert jobs("train.seed=1", "data.crop=128,256") == [
        [[model, "train.seed=1", f"data.crop={crop}"] for model in ("model=nano", "model=micro") for crop in (128, 256)]
    ]


REFUSED = {
    "train.batch_size=3": "model=nano: train.batch_size=3 is not divisible",
    "data.shards=missing": "model=nano: there are no shards at missing",
    "eval.images=missing": "model=nano: there is no folder missing",
    "run.dir=here": "two runs of the sweep share run.dir=here; omit run.dir (run.sweep=NAME puts the runs into",
    "train.seed=1,1": "train.seed=1 twice; give each value only once",
    "hydra.sweep.dir=here": "hydra.sweep.dir=here has no effect; set run.dir=DIR, the run folder",
    f"run.dir=here/${{model.name}}_{'x' * 250}": "too long; choose one with a name of at most 248 bytes",
    f"run.sweep={'x' * 300}": "too long",
    "train.seed=0,-1": "model=nano,train.seed=-1: train.seed=-1",
    "hydra.launcher.gpus_per_job=many": "Integer",
    "hydra.launcher.gpus_per_jop=1": "gpus_per_jop",
    "hydra.launcher.gpus_per_job=0": "hydra.launcher.gpus_per_job=0 must be at least 1",
    "hydra.launcher.jobs_at_once=0": "hydra.launcher.jobs_at_once=0 must be at least 1",
    "hydra.launcher.gpus=[0,-1]": "hydra.launcher.gpus=[0, -1] must be at least 0",
    "hydra.launcher.grace=nan": "hydra.launcher.grace=nan must be at least 0",
    "hydra/launcher=pbs": "pbs",
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_refused_before_anything_starts(train, shards, tmp_path, mistake):
    launcher = () if mistake.startswith("hydra/") else ("hydra/launcher=deepspeed", "hydra.launcher.gpus_per_job=2")
    code, output, errors = train("-m", "model=nano,450k", f"data.shards={shards}", *launcher, mistake)
    assert code == 2 and output == "" and errors.count("\n") == 1 and REFUSED[mistake] in errors, errors
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.launch
@pytest.mark.parametrize("launcher", [(), ONLY_WRITE])
def test_another_sweep_over_the_same_key_is_refused_with_the_remedy(train, shards, tmp_path, launcher):
    call = ("-m", "model=nano,450k", f"data.shards={shards}")
    first = tmp_path / "runs" / "sweep_model" / "model=450k"
    first.mkdir(parents=True)
    config = compose(["model=450k", f"data.shards={shards}", f"run.dir={quoted(str(first))}"])
    (first / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, output, errors = train(*call, "objective.lmbda=0.05", *launcher)
    assert code == 2 and output == "" and errors.count("\n") == 1, errors
    assert errors.startswith("hpcm: runs/sweep_model/model=450k holds a run with objective.lmbda=0.013, not 0.05; ")
    assert errors.endswith("; run.sweep=NAME puts the runs of this sweep into runs/NAME\n")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    code, _, errors = train(*call, "objective.lmbda=0.05", "run.sweep=NAME", *ONLY_WRITE)  # as it says
    assert code == 0 and scripts(tmp_path / "runs" / "NAME").keys() == {"model=nano", "model=450k"}, errors


@pytest.mark.launch
def test_run_dir_may_have_the_swept_key_in_it(train, shards, tmp_path):
    call = ("-m", "model=nano,450k", f"data.shards={shards}", "run.dir=runs/x/${model.name}_of_two", *ONLY_WRITE)
    code, _, errors = train(*call)
    assert code == 0, errors
    written = scripts(tmp_path / "runs" / "x")
    assert {compose(run[:-1]).run.dir for run in written.values()} == {f"runs/x/{name}" for name in written}
    assert written.keys() == {"nano_of_two", "450k_of_two"}
    assert not list(tmp_path.rglob("multirun.yaml"))  # sweep.json has it all
    code, _, errors = train(*call, "objective.lmbda=0.05", "run.sweep=x", "hydra.launcher.gpus_per_node=9")
    assert code == 2 and "run.sweep=NAME" not in errors  # no way out of anything


def test_run_dir_may_have_hydras_number_of_the_job_in_it(train, shards, tmp_path):
    code, _, errors = train("-m", "model=nano,450k", f"data.shards={shards}", "run.dir=x/${hydra:job.num}", *ONLY_WRITE)
    assert code == 0, errors
    assert scripts(tmp_path / "x").keys() == {"0", "1"}


def test_paths_that_differ_in_their_slashes_are_runs_of_their_own(train, shards, tmp_path):
    for name in ("a_b/c", "a/b_c"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(shards)
    code, _, errors = train("-m", "model=nano", "data.shards=a_b/c,a/b_c", *ONLY_WRITE)
    assert code == 0, errors
    assert len(scripts(tmp_path / "runs" / "sweep_data.shards")) == 2


@pytest.mark.parametrize("arguments", [("--help",), ("model=nano", "--cfg", "job"), ("--cfg", "job")])
def test_hydras_own_options_work(train, tmp_path, arguments):
    code, output, errors = train(*arguments)
    assert code == 0 and "model" in output and errors == ""
    assert list(tmp_path.rglob("*")) == []


def test_launchers_are_for_several_runs_and_start_their_own_processes(train, shards, tmp_path, monkeypatch):
    code, _, errors = train("model=nano", f"data.shards={shards}", "hydra/launcher=deepspeed")
    assert code == 2 and "add -m" in errors
    code, _, errors = train("-m", "model=nano,450k", f"data.shards={shards}", "hydra/launcher=basic")
    assert code == 2 and "hydra/launcher=basic cannot start training" in errors
    assert list(tmp_path.rglob("*")) == []
    monkeypatch.setenv("RANK", "0")
    code, _, errors = train("-m", "model=nano,450k", f"data.shards={shards}", "hydra/launcher=deepspeed")
    assert code == 2 and "without deepspeed" in errors


def test_without_sbatch_one_sentence_explains_it(train, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, errors = train("-m", "model=nano,450k", f"data.shards={shards}", "hydra/launcher=slurm", *ONLY_WRITE[2:])
    assert code == 2 and errors.count("\n") == 1 and "sbatch is not installed" in errors
    assert not (tmp_path / "runs" / "sweep_model").exists()


def test_slurm_scripts_have_the_options_given(train, shards, tmp_path):
    options = (
        "nodes=2",
        "gpus_per_node=4",
        "partition=gpu",
        "account=codec",
        "time=1:00:00",
        "setup=['module load cuda']",
    )
    launcher = (
        *ONLY_WRITE[:2],
        *(f"hydra.launcher.{option}" for option in options),
        "hydra.launcher.options=['--qos=x']",
    )
    code, _, errors = train("-m", "model=nano,450k", f"data.shards={shards}", "train.batch_size=8", *launcher)
    assert code == 0, errors
    [script, _] = sorted((tmp_path / "runs" / "sweep_model").glob("*.sbatch"))
    header = [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    expected = ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--partition=gpu", "--account=codec")
    assert {*expected, "--time=1:00:00", "--qos=x", "--requeue", "--dependency=singleton"} <= set(header)
    assert "\nmodule load cuda\n" in script.read_text() and not re.search("@[A-Z]+@", script.read_text())
    subprocess.run(["bash", "-n", script], check=True)


def test_every_experiment_that_sweeps_names_its_sweep():
    sweeps = [name for name in preset_names("experiment") if compose([f"experiment={name}"]).run.sweep]
    assert {"ladder", "paper_ladder"} <= set(sweeps)
