"""train.profile_steps: a trace of the steps asked for, and of no others, from real trainings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from small_training import SMALL

from hpcm_scale.training.diagnostics import out_of_reach

pytestmark = pytest.mark.launch


def steps_in(file: Path) -> list[str]:
    """The ranges of whole steps in a trace, in the order of time."""
    with gzip.open(file, "rt", encoding="utf-8") as handle:
        events = json.load(handle)["traceEvents"]
    assert any(event["name"] == "aten::convolution_backward" for event in events)
    found = [event for event in events if event["name"].startswith("step ") and event.get("cat") == "user_annotation"]
    return [event["name"] for event in sorted(found, key=lambda event: event["ts"])]


def test_the_steps_asked_for_are_in_the_trace(train, launch):
    lines = train("profile", "engine=zero2", "train.steps=4", "train.profile_steps=[2,3]")
    folder = launch.folder / "profile/profile"
    assert sorted(file.name for file in folder.iterdir()) == ["steps_2-3.json.gz", "steps_2-3.txt"]
    assert steps_in(folder / "steps_2-3.json.gz") == ["step 2", "step 3"]
    assert "aten::convolution_backward" in (folder / "steps_2-3.txt").read_text(encoding="utf-8")
    assert train.output.count("profile of steps 2-3 of rank 0: profile/profile/steps_2-3.json.gz") == 1
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]


def test_a_run_that_stops_in_between_goes_on_with_the_rest(train, launch):
    """Steps are counted as the run's, and what was written before stays."""
    keys = ("profile_resumed", "engine=accelerate", "train.steps=4", "train.profile_steps=[2,3]")
    train(*keys, "train.stop_after=2", processes=1)
    train(*keys, processes=1)
    folder = launch.folder / "profile_resumed/profile"
    traces = sorted(folder.glob("*.json.gz"))
    assert [trace.name for trace in traces] == ["steps_2-2.json.gz", "steps_3-3.json.gz"]
    assert [steps_in(trace) for trace in traces] == [["step 2"], ["step 3"]]


def test_steps_that_a_command_does_not_come_by_are_reported():
    assert [out_of_reach([3, 5], done, last) for done, last in ((0, 3), (2, 9), (4, 9))] == ["", "", ""]
    assert out_of_reach([], 0, 9) == ""
    assert out_of_reach([3, 5], 5, 9).endswith("train.profile_steps=[3, 5], and this command resumes after step 5")
    assert out_of_reach([3, 5], 0, 2).endswith("train.profile_steps=[3, 5], and this command ends at step 2")


def test_a_rollback_profiles_the_steps_once_more(launch, shards, project):
    """The profiler of an attempt that diverged while it was on does not keep the next one from starting."""
    result = launch(
        *SMALL,
        f"data.shards={shards}",
        "run.dir=profile_rollback",
        "engine=accelerate",
        "train.steps=3",
        "train.on_divergence=rollback",
        "train.profile_steps=[1,2]",
        processes=1,
        module="diverging_train",
        DIVERGE=json.dumps({"kind": "loss", "image": 4}),
        PYTHONPATH=str(project / "tests" / "training"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "rolled back to step 0" in result.stdout + result.stderr
    folder = launch.folder / "profile_rollback/profile"
    assert steps_in(folder / "steps_1-2.json.gz") == ["step 1", "step 2"]
