"""The script for a new machine with GPUs, without one: its rehearsal, and on a CPU what only a GPU can pass."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import create_autospec

import gpu_acceptance
import gpu_speed
import pytest
import torch
from bench import step
from gpu_checks import CHECKS, PART_SECONDS
from gpu_findings import Check, Findings, Setting, perform

from hpcm_scale.model.compiled import compile_regions


def script(project: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """What the script says and ends with."""
    command = [sys.executable, project / "benchmarks" / "gpu_acceptance.py", "--device", "cpu", "--tiny", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def setting(folder: Path, shards: Path) -> Setting:
    return Setting(torch.device("cpu"), tiny=True, folder=folder, shards=shards, images=folder)


def performed(check: Check, folder: Path, shards: Path) -> dict:
    """The findings of a check in this process."""
    perform(check, setting(folder, shards))
    return json.loads((folder / "found.json").read_text())


def reported_in(stdout: str) -> list[dict]:
    """The outcomes of the checks."""
    return [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]


@pytest.fixture
def signals_left_alone() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.launch
@pytest.mark.usefixtures("signals_left_alone")
def test_one_check_of_the_rehearsal_passes(tmp_path, monkeypatch, capsys):
    """Its material is of no use to this one."""
    monkeypatch.setattr(gpu_acceptance, "make_material", lambda folder: None)
    arguments = argparse.Namespace(device="cpu", tiny=True, only="9,13", out=tmp_path)
    assert gpu_acceptance.accept(arguments) == 0
    reported = reported_in(capsys.readouterr().out)
    results = {outcome["check"]: outcome["result"] for outcome in reported}
    assert results == {"9": "needs a GPU", "13": "passed"}
    assert json.loads((tmp_path / "results.json").read_text())["checks"] == reported
    assert "Nothing here ran on a GPU" in (tmp_path / "results.md").read_text()


@pytest.mark.long
def test_the_rehearsal_runs_with_wheels(project, tmp_path):
    """Of which nothing is missing, so an empty folder does."""
    (tmp_path / "wheels").mkdir()
    done = script(project, "--only", "9", "--wheels", tmp_path / "wheels")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [outcome["result"] for outcome in reported_in(done.stdout)] == ["needs a GPU"]


@pytest.mark.long
def test_the_rehearsal_passes(project, tmp_path):
    """As benchmarks/results/gpu_acceptance_rehearsal.md was made."""
    done = script(project, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    reported = reported_in(done.stdout)
    for outcome in reported:
        needs_gpu = next(check.needs_gpu for check in CHECKS if str(check.number) == outcome["check"])
        assert outcome["result"] == ("needs a GPU" if needs_gpu else "passed"), outcome
    assert {outcome["check"] for outcome in reported} == {str(check.number) for check in CHECKS}


def test_what_needs_a_gpu():
    assert {check.number for check in CHECKS} == set(range(1, 16))
    assert {check.number for check in CHECKS if check.needs_gpu} == {1, 9, 10, 11, 12, 14}


@pytest.mark.long
def test_two_processes_take_part_in_a_check(tmp_path):
    arguments = argparse.Namespace(device="cpu", tiny=True)
    check = next(check for check in CHECKS if check.number == 6)
    gpu_acceptance.make_material(tmp_path)
    outcome = gpu_acceptance.outcome_of(gpu_acceptance.Row(check, 2), arguments, tmp_path, reserved=0.0)
    assert outcome["result"] == "passed", outcome


@pytest.mark.launch
def test_a_check_that_takes_too_long_is_ended_and_fails(tmp_path):
    arguments = argparse.Namespace(device="cpu", tiny=True)
    slow = replace(CHECKS[1], seconds=0.01)
    outcome = gpu_acceptance.outcome_of(gpu_acceptance.Row(slow, 1), arguments, tmp_path, reserved=0.0)
    assert outcome["result"] == "failed" and outcome["failures"] == ["it was killed after 1 s"]


@pytest.mark.long
@pytest.mark.parametrize("number", [9, 10, 11, 12, 14])
def test_what_only_a_gpu_passes_runs_on_a_cpu(number, tmp_path, monkeypatch):
    """Every line but those of CUDA itself; without the code generator, which takes minutes for a CPU."""
    monkeypatch.setattr(step, "compile_regions", partial(compile_regions, backend="eager"))
    torch._dynamo.reset()
    check = next(check for check in CHECKS if check.number == number)
    found = performed(check, tmp_path, tmp_path)
    assert found["done"] and found["failures"] == []
    assert found["figures"]


@pytest.mark.long
def test_a_training_prints_nothing_but_ours(tmp_path, shards):
    """All that the first check can miss without a GPU is the peak rate of one."""
    found = performed(CHECKS[0], tmp_path, shards)
    assert [failure for failure in found["failures"] if "peak rate of cpu" not in failure] == []
    assert len(found["failures"]) == 1


def test_cuda_is_called_as_torch_has_it(monkeypatch):
    """Names and arguments, not what the calls do: a graph captured and replayed, a stream that sleeps, a peak."""
    names = ["Stream", "current_stream", "stream", "CUDAGraph", "graph", "_sleep", "synchronize", "empty_cache"]
    for name in [*names, "reset_peak_memory_stats", "max_memory_allocated"]:
        monkeypatch.setattr(torch.cuda, name, create_autospec(getattr(torch.cuda, name)))
    torch.cuda.max_memory_allocated.return_value = 5
    done, device = [], torch.device("cuda", 0)
    replay = gpu_speed.graphed(lambda: done.append("run") or 7, device, clear=lambda: done.append("clear"))
    assert done == ["run"] * 3 + ["clear", "run"] and replay() == 7
    torch.cuda.CUDAGraph.return_value.replay.assert_called_once_with()
    gpu_speed.behind_a_sleeping_stream(lambda: done.append("launch"), device, 0.01)
    assert done[-1] == "launch" and torch.cuda._sleep.call_count == 3
    assert gpu_speed.peak_of_step(lambda: done.append("step"), device) == 5 and done[-2:] == ["step", "step"]


def test_what_a_check_has_found_outlives_its_failure(tmp_path):
    def failing(setting: Setting, found: Findings) -> None:
        found.note("figure", {"of": [1 / 3]})
        found.expect(False, "it is wrong")
        raise ArithmeticError("one and one is three")

    found = performed(replace(CHECKS[0], run=failing), tmp_path, tmp_path)
    assert found["figures"] == {"figure": {"of": [0.3333]}}
    assert found["failures"] == ["it is wrong", "ArithmeticError: one and one is three"]


def test_parts_take_no_longer_than_they_may_and_come_in_order():
    """Of which seven seconds are for imports and shards before the first check."""
    rows = gpu_acceptance.chosen("a,b,c,d", CHECKS, devices=2)
    for part in "abcd":
        assert 0 < sum(row.check.seconds for row in rows if row.part == part) <= PART_SECONDS - 7
        first = next(row for row in rows if row.part == part)
        left = PART_SECONDS - 7 - gpu_acceptance.reserve(rows[rows.index(first) :])
        assert left >= 1.5 * first.check.seconds  # of which nobody knows better before it has run on a GPU
    assert "".join(row.part for row in rows) == "".join(sorted(row.part for row in rows))
    assert [row.name for row in rows if row.part == "d"] == [f"{number} (2 processes)" for number in range(4, 8)]


@pytest.mark.parametrize(
    ("only", "devices", "names"),
    [
        ("a", 2, ["1", "2", "3", "4", "9"]),
        ("14,2", 1, ["2", "14"]),
        ("4,c", 2, ["4", "10", "11", "12", "15", "4 (2 processes)"]),
        ("d", 2, ["4 (2 processes)", "5 (2 processes)", "6 (2 processes)", "7 (2 processes)"]),
    ],
)
def test_checks_are_chosen_by_number_and_part(only, devices, names):
    assert [row.name for row in gpu_acceptance.chosen(only, CHECKS, devices)] == names


@pytest.mark.parametrize(
    ("only", "reason"),
    [("16,e", "there is no check or part 16, e"), ("d", "two GPUs"), (",", "name a check or a part")],
)
def test_what_cannot_be_chosen_is_refused(only, reason):
    with pytest.raises(ValueError, match=reason):
        gpu_acceptance.chosen(only, CHECKS, devices=1)


def test_a_place_that_cannot_be_written_is_refused_before_the_checks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_acceptance, "make_material", lambda folder: pytest.fail("checks have begun"))
    (tmp_path / "file").touch()
    for out, reason in ((tmp_path / "file", "is a file; choose another"), (Path("/proc/new"), "is read-only")):
        assert gpu_acceptance.accept(argparse.Namespace(device="cpu", tiny=True, only="1", out=out)) == 2
        reported = capsys.readouterr().err
        assert (
            reported.startswith(f"gpu_acceptance: --out {out} cannot be")
            and reason in reported
            and reported.count("\n") == 1
        )


def test_ctrl_c_ends_the_script_without_a_traceback(monkeypatch):
    monkeypatch.setattr(gpu_acceptance, "accept", lambda arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(sys, "argv", ["gpu_acceptance.py", "--device", "cpu"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(SystemExit) as ended:
        gpu_acceptance.main()
    assert ended.value.code == 130
