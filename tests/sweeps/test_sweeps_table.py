"""Forecasts of runs that train, and `hpcm sweep table`."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from hpcm_scale.commands.sweep import main
from hpcm_scale.sweeps.forecast import forecast
from hpcm_scale.sweeps.status import Follower, look, table
from hpcm_scale.sweeps.table import grouped


def law(images: np.ndarray) -> np.ndarray:
    return 0.6 + 9.0 * images**-0.35


def rewritten(folder, losses) -> None:
    """The journal of a run of `make_run` with other training losses."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line, loss in zip(lines, losses, strict=True):
        line["train/loss"] = loss
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_power_law_is_continued_exactly():
    images = np.arange(1.0, 1001.0) * 8
    assert forecast(law(images), images, 2.0) == pytest.approx(law(2 * images[-1]), rel=1e-4)
    assert forecast(law(images)[:10], images[:10], 2.0) is None  # too few lines
    assert forecast(np.ones(1000), images, 2.0) is None
    assert forecast(law(images), images, 2.1) is None  # less than half of the run
    assert forecast(1 + 1e-4 * images, images, 2.0) is None  # it rises


def test_status_has_a_forecast_for_runs_that_train(make_run, capsys):
    run = make_run("run", 400, "train.steps=800")
    losses = law(4.0 * np.arange(1, 401)) * np.exp(0.01 * np.random.default_rng(0).standard_normal(400))
    rewritten(run, losses.tolist())
    state = Follower(run).look()
    assert state.state == "running" and state.forecast == pytest.approx(law(4.0 * 800), rel=0.02)
    main(["status", str(run.parent)])
    assert " forecast " in capsys.readouterr().out
    make_run("done", 400, "train.steps=400")
    assert Follower(run.parent / "done").look().forecast is None


def test_the_forecast_column_is_left_out_if_no_run_has_one(make_run):
    run = make_run("run", 4)
    assert not any(column.header == "forecast" for column in table([Follower(run).look()]).renderables[0].columns)


def test_seeds_are_grouped_with_the_interval_of_their_mean(make_run, tmp_path, capsys):
    values = (1.0, 1.1, 1.3)
    for seed, value in enumerate(values):
        run = make_run(f"sweep/model=nano,train.seed={seed}", 10, f"train.seed={seed}", evaluate=10)
        text = (run / "metrics.jsonl").read_text().replace('"eval/loss": 0.9', f'"eval/loss": {value}')
        (run / "metrics.jsonl").write_text(text)
    make_run("sweep/model=nano,train.seed=3", 4, "train.seed=3", evaluate=4)  # at another step
    make_run("sweep/model=nano,objective.lmbda=0.05", 10, "objective.lmbda=0.05")
    made = {(row.name, row.step): row for row in grouped(look([tmp_path / "sweep"], {}))}
    row = made["model=nano", 10]
    mean, half = row.measures["loss"]
    # Student's t for two degrees of freedom is 4.3027 at 97.5 %; the standard deviation is 0.15275.
    assert (row.runs, mean, half) == (
        3,
        pytest.approx(1.13333, abs=1e-5),
        pytest.approx(4.3027 * 0.15275 / 3**0.5, abs=1e-4),
    )
    assert made["model=nano,train.seed=3", 4].runs == 1
    other = made["model=nano,objective.lmbda=0.05", 10]
    assert other.runs == 1 and np.isnan(other.measures["loss"][1]) and not other.evaluated and len(made) == 3

    main(["table", str(tmp_path / "sweep"), "--csv", str(tmp_path / "table.csv")])
    output = capsys.readouterr().out
    assert "1.13 ± 0.38" in output and "0.9984*" in output and "smoothed training loss" in output
    lines = {line["configuration"]: line for line in csv.DictReader((tmp_path / "table.csv").open())}
    line, alone = lines["model=nano"], lines["model=nano,objective.lmbda=0.05"]
    assert (float(line["loss"]), float(line["loss_high"]), line["runs"]) == (mean, mean + half, "3")
    assert line["parameters"] == "210719" and float(line["pflops"]) == pytest.approx(0.1)
    assert alone["loss_low"] == "" and alone["evaluated"] == "False"
