"""Runs as they are read back; those of wandb are made by wandb, in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpcm_scale.errors import UserError
from hpcm_scale.scaling.runs import Records, _entries, find_runs, load_run
from hpcm_scale.tracking.journal import read_journal

CONFIG = {"model": {"name": "nano"}, "objective": {"lmbda": 0.013}, "train": {"steps": 60}}
WANDB = """
import json, os, sys
from pathlib import Path
os.environ["WANDB_ERROR_REPORTING"] = "false"
import wandb
for order in json.loads(sys.stdin.read()):
    run = wandb.init(dir=order["dir"], id=order["id"], name=order["name"], mode="offline", config=order["config"])
    run.config.update({"environment": {"python": "3.11"}})
    for line in order["lines"]:
        run.log(line)
    run.finish()
"""


def lines(first: int, last: int, offset: float = 0.0) -> list[dict]:
    made = []
    for step in range(first, last + 1):
        axes = {"step": step, "time": step / 2, "train/images": 8 * step, "compute/pflops": 0.1 * step / 3}
        made.append(axes | {"train/loss": 1 + 10 / step + offset, "train/psnr": float(30 + step % 2)})
        if step % 20 == 0:
            made.append(axes | {"eval/loss": 2 / step + offset})
    return made


def write(folder: Path, config: dict = CONFIG, journal: list[dict] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(config))
    text = "".join(json.dumps(line) + "\n" for line in journal or lines(1, 60))
    (folder / "metrics.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def kept_by_wandb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, the first stopped and resumed 10 steps back, and a wandb run that is no training."""
    folder = tmp_path_factory.mktemp("kept")
    orders = [
        {"dir": "one", "id": "aaaa0001", "name": "nano", "config": CONFIG, "lines": lines(1, 40, offset=1.0)},
        {"dir": "two", "id": "bbbb0002", "name": "nano", "config": CONFIG, "lines": lines(1, 60)},
        {"dir": "two", "id": "cccc0003", "name": "laws", "config": {"note": 1}, "lines": [{"slope": 0.1}]},
        {"dir": "one", "id": "aaaa0001", "name": "nano", "config": CONFIG, "lines": lines(31, 60)},
    ]
    for order in orders:
        order["dir"] = str(folder / order["dir"])
        Path(order["dir"]).mkdir(exist_ok=True)
    command = [sys.executable, "-c", WANDB]
    subprocess.run(command, input=json.dumps(orders), text=True, check=True, capture_output=True, timeout=400)
    return folder


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """Starts wandb's reader once for the same bytes."""
    entries: dict[bytes, list[dict]] = {}

    def known(file: Path) -> list[dict]:
        data = file.read_bytes()
        if data not in entries:
            entries[data] = list(_entries(file))
        return entries[data]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hpcm_scale.scaling.runs._entries", known)
        yield


def test_records_are_the_lines_as_columns(tmp_path: Path) -> None:
    made = lines(1, 9000)
    made[5]["train/loss"] = None
    made[6]["note"] = "text"
    made[7]["list"] = [1]
    records = Records(iter(made))
    assert len(records) == len(made) == 9450 and bool(records) and not Records()
    assert records[0] == made[0] and records[-1] == made[-1] and records[9000] == made[9000]
    assert isinstance(records[3]["step"], int)
    assert records[5] == {key: value for key, value in made[5].items() if value is not None}
    assert "note" not in records[6] and "list" not in records[7]
    assert records.nulls == {"train/loss": 1}
    loss = records.column("train/loss")
    assert loss.dtype == np.float64 and loss.shape == (9450,) and np.isnan(loss).sum() == 451
    assert np.isnan(records.column("nothing")).all()
    assert [record["step"] for record in records] == [record["step"] for record in made]
    assert records.rows("eval/loss").size == 450 and records.repeated("eval/loss") == 0
    with pytest.raises(TypeError):
        Records([5])


def test_of_lines_of_one_step_the_last_counts() -> None:
    records = Records([*lines(1, 40, offset=1.0), *lines(31, 60)])
    steps, loss = (records.column(key)[records.rows("train/loss")] for key in ("step", "train/loss"))
    assert steps.tolist() == list(range(1, 61))
    assert loss == pytest.approx([1 + 10 / step + (step <= 30) for step in range(1, 61)])
    assert records.repeated("train/loss") == 10 and records.repeated("eval/loss") == 1


def test_names_are_as_long_as_it_takes(tmp_path: Path) -> None:
    for name in ("a/nano", "b/nano", "b/mini", "c/deep/nano", "d/deep/nano"):
        write(tmp_path / name)
    names = ["a/nano", "b/mini", "b/nano", "c/deep/nano", "d/deep/nano"]
    runs = find_runs([tmp_path])
    assert sorted(run.name for run in runs) == sorted(name if name != "b/mini" else "mini" for name in names)
    assert {run.name: run.folder for run in find_runs([tmp_path / "d", tmp_path])} == {
        run.name: run.folder for run in runs
    }
    assert all(str(run.folder).endswith(run.name) for run in runs)
    assert [run.name for run in find_runs([tmp_path / "b"])] == ["mini", "nano"]


def test_links_to_folders_above_are_followed_once(tmp_path: Path) -> None:
    run = write(tmp_path / "sweep" / "one")
    for name in ("again", "latest", "this"):
        (tmp_path / "sweep" / name).symlink_to(".")
    (tmp_path / "sweep" / "up").symlink_to("..")
    assert [found.folder for found in find_runs([tmp_path])] == [run]


def test_a_damaged_run_is_reported_in_one_sentence(tmp_path: Path) -> None:
    (write(tmp_path / "a") / "config.yaml").write_text("model: [")
    with pytest.raises(UserError) as refused:
        load_run(tmp_path / "a")
    assert refused.value.code == "unreadable-run-config"
    (write(tmp_path / "b") / "config.yaml").write_text("just words")
    with pytest.raises(UserError) as refused:
        load_run(tmp_path / "b")
    assert (refused.value.code, refused.value.key) == ("incomplete-run-config", "model.name")
    with pytest.raises(UserError) as refused:
        load_run(write(tmp_path / "c", CONFIG | {"train": {}}))
    assert (refused.value.code, refused.value.key) == ("incomplete-run-config", "train.steps")
    with (write(tmp_path / "d") / "metrics.jsonl").open("a") as journal:
        journal.write("5\n")
    with pytest.raises(UserError) as refused:
        load_run(tmp_path / "d")
    assert refused.value.code == "non-object-journal-line"


@pytest.mark.launch
def test_wandb_runs_are_read_where_there_is_no_journal(kept_by_wandb: Path) -> None:
    runs = find_runs([kept_by_wandb])
    assert [run.name for run in runs] != ["nano", "nano"] and len({run.name for run in runs}) == len(runs) == 2
    assert all(run.name.endswith("/nano") for run in runs)
    resumed, whole = runs
    assert whole.config == CONFIG | {"environment": {"python": "3.11"}, "_wandb": {}}
    assert whole.finished and resumed.finished and whole.step == 60
    expected = Records(lines(1, 60))
    for metric in ("train/loss", "eval/loss", "train/psnr"):
        compute, values = whole.curve(metric)
        rows = expected.rows(metric)
        assert np.array_equal(compute, expected.column("compute/pflops")[rows])  # to the last bit
        assert np.array_equal(values, expected.column(metric)[rows])
    assert resumed.curve("train/loss")[1] == pytest.approx([1 + 10 / step + (step <= 30) for step in range(1, 61)])
    assert resumed.records.repeated("train/loss") == 10


@pytest.mark.launch
def test_a_wandb_run_is_named_by_file_or_folder(kept_by_wandb: Path, tmp_path: Path) -> None:
    [folder] = (kept_by_wandb / "two" / "wandb").glob("offline-run-*-bbbb0002")
    [file] = folder.glob("*.wandb")
    assert [run.name for run in find_runs([folder])] == ["nano"]
    assert [run.name for run in find_runs([file, folder, folder.parent])] == ["nano"]
    [laws] = (kept_by_wandb / "two" / "wandb").glob("offline-run-*-cccc0003")
    with pytest.raises(UserError) as refused:
        find_runs([laws])
    assert refused.value.code == "no-training-in-wandb-file"
    torn = tmp_path / "torn.wandb"  # a run that lives, or died
    torn.write_bytes(file.read_bytes()[:9000])
    assert 1 <= find_runs([torn])[0].step < 60
    torn.write_bytes(b"something else")
    with pytest.raises(UserError) as refused:
        find_runs([torn])
    assert refused.value.code == "unreadable-wandb-file"


@pytest.mark.launch
def test_a_journal_goes_before_wandb(kept_by_wandb: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "runs" / "two")
    shutil.copytree(kept_by_wandb / "two" / "wandb", folder / "wandb", symlinks=True)
    (folder / "wandb_id").write_text("bbbb0002\n")
    [run] = find_runs([tmp_path])
    assert run.folder == folder and len(run.records) == len(read_journal(folder / "metrics.jsonl"))
    runs = find_runs([folder, kept_by_wandb])  # wandb's copy of a run whose journal is there, too
    assert [run.records.repeated("train/loss") for run in runs] == [0, 10]
