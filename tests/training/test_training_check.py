"""`hpcm check` on real processes: it measures, says what it found, leaves the run folder alone, and ends."""

from __future__ import annotations

import json

import pytest
from small_training import SMALL

from hpcm_scale.commands.check import PROBLEM

pytestmark = pytest.mark.launch


@pytest.fixture
def check(launch, project):
    """`check(*arguments)`: `launch` with a module that checks."""

    def start(*arguments: str, module: str = "quick_check", **options):
        return launch(*arguments, module=module, PYTHONPATH=str(project / "tests" / "training"), **options)

    return start


@pytest.fixture
def keys(shards) -> list[str]:
    return [*SMALL, f"data.shards={shards}", "run.dir=checked", "data.workers=1"]


@pytest.mark.parametrize(
    "launcher", [pytest.param(False, id="forked"), pytest.param(True, id="deepspeed", marks=pytest.mark.long)]
)
def test_two_processes(launcher, check, launch, keys, tmp_path):
    """Also as a user starts it. What is slow here may be found, and then decides the exit code."""
    file = tmp_path / "check.json"
    result = check(*keys, "engine=zero2", "--json", str(file), launcher=launcher)
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert result.returncode == (PROBLEM if figures["problems"] else 0), result.stdout + result.stderr
    lines = result.stdout.splitlines()
    said = [f"- {sentence}" for sentence in figures["problems"]] or ["no problem found"]
    assert [lines.count(line) for line in said] == [1] * len(said)
    assert sum("ranks 0-1 | cpu | not known" in line for line in lines) == 1
    (node,) = figures["nodes"]
    assert node["ranks"] == [0, 1] and node["versions"]["deepspeed"] == "0.19.8" and node["disk_writable"]
    among = f"within {node['host']}"
    assert [(one["among"], one["processes"], one["bytes"]) for one in figures["all_reduces"]] == [
        (among, 2, 2**20),
        (among, 2, 2**24),
    ]
    assert all(one["bandwidth"] == pytest.approx(one["bytes"] / one["seconds"]) for one in figures["all_reduces"])
    assert figures["data"]["crops"] > 0 and figures["data"]["images"] > 0 and figures["data"]["bad"] == []
    assert figures["step"]["images"] == 4 and figures["step"]["loss"] > 0 and figures["step"]["peak"] is None
    assert figures["step"]["estimated_peak"] > 0 and figures["checkpoints"]["bytes"] == 4 * 3 * 63_391
    stages = [line for line in result.stderr.splitlines() if line.startswith("checking ")]
    assert stages == [f"checking {stage} …" for stage in STAGES]
    assert not (launch.folder / "checked").exists()


STAGES = ("the configuration", "versions and drivers", "all-reduce", "reading of the shards", "a training step")


def test_nodes(check, keys, tmp_path):
    """Three processes taken for two nodes, of which one has an older deepspeed."""
    file = tmp_path / "check.json"
    options = {"processes": 3, "module": "two_nodes_check"}
    result = check(*keys, "engine=zero2", "train.batch_size=3", "--json", str(file), **options)
    assert result.returncode == PROBLEM, result.stdout + result.stderr
    figures = json.loads(file.read_text(encoding="utf-8"))
    assert [(node["host"], node["ranks"]) for node in figures["nodes"]] == [("a", [0, 1]), ("b", [2])]
    assert [[device["rank"] for device in node["devices"]] for node in figures["nodes"]] == [[0, 1], [2]]
    among = [("within a", 2), ("between nodes", 2), ("all processes", 3)]
    assert [(one["among"], one["processes"]) for one in figures["all_reduces"]] == [
        each for each in among for _ in range(2)
    ]
    assert "b has deepspeed 0.0.1, and a has 0.19.8; install the same version on all nodes" in figures["problems"]


def test_one_process(check, launch, keys):
    result = check(*keys, "engine=accelerate", processes=1)
    assert result.returncode in (0, PROBLEM), result.stdout + result.stderr
    assert (
        "| a step of 4 images | measured | estimated |" in result.stdout
        and "all-reduce" not in result.stdout + result.stderr
    )
    assert not (launch.folder / "checked").exists()


def test_one_process_that_fails_ends_all(check, launch, keys):
    """The sentence comes once, and what was found before it stays on the terminal."""
    result = check(*keys, "engine=zero2", module="failing_check")
    said = result.stdout + result.stderr
    assert result.returncode == 1 and "Traceback" not in said, said
    assert [line for line in said.splitlines() if "out of memory" in line] == [
        "hpcm: rank 1 ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB); set "
        "train.micro_batch_size=1 or engine.activation_checkpointing=blocks or engine=zero3, and run the command again"
    ]
    assert "| crops, data.workers=1 per process |" in result.stdout
    assert not (launch.folder / "checked").exists()


def test_what_training_would_refuse_is_refused(check, keys):
    result = check(*keys, "train.batch_size=3")
    assert result.returncode == 2 and "is not divisible by 2 processes" in result.stderr, result.stderr


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(check, keys, tmp_path):
    result = check(*keys, "--json", str(tmp_path))
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count(f"cannot write {tmp_path} (Is a directory)") == 1
    assert "versions" not in result.stderr and result.stdout == "" and list(tmp_path.iterdir()) == []


def test_processes_whose_launcher_is_killed_end(check, launch, keys):
    """They do not measure on, unseen, on the devices of the next job."""
    result = check(*keys, "engine=zero2", module="orphaned_check")
    said = result.stdout + result.stderr
    assert result.returncode == 1 and "Traceback" not in said, said
    assert said.count("hpcm: the launcher of these processes has exited; run the same command again") == 1
    assert "a training step" not in said and not (launch.folder / "checked").exists()
