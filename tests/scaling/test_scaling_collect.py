from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from known_ladder import SIZES, write_run

from hpcm_scale.errors import UserError
from hpcm_scale.scaling.collect import collect, thin
from hpcm_scale.scaling.observations import study
from hpcm_scale.scaling.runs import find_runs
from hpcm_scale.tracking.journal import read_journal


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_collected_ladder_is_small_and_tells_the_same(ladder_runs, ladder_study, tmp_path) -> None:
    """So the laws are the same, too: they follow from nothing else."""
    size = collect(find_runs([ladder_runs]), tmp_path / "kept", most_bytes=350_000)
    assert size == bytes_of(tmp_path / "kept") <= 350_000 < bytes_of(ladder_runs)
    again = study(find_runs([tmp_path / "kept"]))
    np.testing.assert_equal(asdict(again), asdict(ladder_study))
    assert {point.cooldown_of for point in again.observations if point.cooldown_of} == set(SIZES)


@pytest.mark.launch
def test_smoothing_gives_the_same_curve_of_training_losses(ladder_runs, tmp_path) -> None:
    collect(find_runs([ladder_runs]), tmp_path, every=20)
    whole, thinned = (study(find_runs([folder]), "train/loss") for folder in (ladder_runs, tmp_path))
    kept = {curve.run: curve for curve in thinned.curves}
    assert kept.keys() == {curve.run for curve in whole.curves}
    for curve, observation in zip(whole.curves, whole.observations, strict=True):
        other = kept[curve.run]
        if observation.cooldown_of:
            assert other.pflops.size >= min(curve.pflops.size, 50)
            continue
        assert other.pflops.size < curve.pflops.size / 2
        later = other.pflops > curve.pflops[-1] / 20
        reference = np.interp(np.log(other.pflops[later]), np.log(curve.pflops), curve.smoothed)
        difference = other.smoothed[later] / reference - 1
        assert np.abs(difference).max() < 0.04  # single lines scatter by 5 %
        assert np.sqrt(np.mean(difference**2)) < 0.012
        assert abs(difference.mean()) < 0.004
        assert curve.pflops[-1] == other.pflops[-1]


def test_nothing_of_the_machine_is_left(ladder_runs, tmp_path) -> None:
    collect(find_runs([ladder_runs / "nano", ladder_runs / "nano-at-200"]), tmp_path)
    text = "".join(path.read_text() for path in tmp_path.rglob("*.*"))
    assert str(ladder_runs) not in text
    assert "/data/" not in text
    assert "perf/" not in text
    run = next(run for run in find_runs([tmp_path]) if run.name == "nano-at-200")
    config = run.config
    reported = (config["run"]["dir"], config["run"]["cooldown_of"], config["data"]["shards"], config["eval"]["images"])
    assert reported == ("nano-at-200", "nano", "shards", "kodak")


def test_a_short_run_keeps_enough_lines_to_be_smoothed(tmp_path) -> None:
    run = write_run(tmp_path / "runs" / "short", "nano", 240)
    collect(find_runs([run]), tmp_path / "kept", every=1000)
    assert 50 <= sum("train/loss" in line for line in read_journal(tmp_path / "kept" / "short" / "metrics.jsonl")) <= 80


def test_lines_that_stand_for_others_are_their_means() -> None:
    axes = [{"step": s, "time": s / 2, "train/images": 8 * s, "compute/pflops": 1e-3 * s} for s in range(1000, 1010)]
    losses = [1.0, 2.0, None, 3.0, 6.0, 4.0, 5.0, 7.0, 8.0, 9.0]
    lines = [
        place | {"train/loss": loss, "train/skipped": 1, "train/learning_rate": 1.0, "perf/mfu": 0.4}
        for place, loss in zip(axes, losses, strict=True)
    ]
    evaluation = axes[3] | {"eval/loss": 2.123456789}
    thinned = list(thin([*lines[:4], evaluation, *lines[4:]], every=4, fewest=1))
    assert [line["step"] for line in thinned] == [1002, 1003, 1006, 1008, 1009]
    assert thinned[0] == axes[2] | {"train/loss": 2.0, "train/skipped": 4, "train/learning_rate": 1.0}
    assert thinned[1] == evaluation
    assert [line.get("train/loss") for line in thinned[2:]] == [5.5, 8.0, 9.0]


def test_steps_of_the_learning_rate_and_early_steps_are_not_averaged_over() -> None:
    lines = [
        {"step": s, "time": s, "train/images": s, "compute/pflops": s * 1e-3, "train/loss": 1.0}
        | {"train/learning_rate": 1.0 if s <= 505 else 0.1}
        for s in range(1, 1001)
    ]
    thinned = list(thin(lines, every=1000, fewest=1))
    assert [line["step"] for line in thinned[:8]] == list(range(1, 9))
    assert {line["train/learning_rate"] for line in thinned} == {1.0, 0.1}
    decades = np.diff(np.log10([line["compute/pflops"] for line in thinned[8:]]))
    assert decades.max() < 0.1


def test_a_living_run_is_collected_whole_lines_only(tmp_path) -> None:
    run = write_run(tmp_path / "runs" / "young", "nano", 400, done=90)
    with (run / "metrics.jsonl").open("a") as journal:
        journal.write('{"step": 91, "ti')
    collect(find_runs([run]), tmp_path / "kept", every=1)
    kept, whole = (read_journal(folder / "metrics.jsonl") for folder in (tmp_path / "kept" / "young", run))
    assert kept == [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in whole]


def test_runs_are_not_replaced_by_their_copies(tmp_path) -> None:
    run = write_run(tmp_path / "runs" / "nano", "nano", 100)
    before = bytes_of(run)
    with pytest.raises(UserError) as refused:
        collect(find_runs([run]), tmp_path / "runs")
    assert (refused.value.code, refused.value.key) == ("collect-into-runs", "--out")
    assert bytes_of(run) == before


def test_too_few_bytes_are_refused_with_what_would_do(ladder_runs, tmp_path) -> None:
    runs = find_runs([ladder_runs / "nano"])
    with pytest.raises(UserError) as refused:
        collect(runs, tmp_path / "kept", most_bytes=3000)
    assert (refused.value.code, refused.value.key) == ("most-bytes-too-small", "--most-bytes")
    assert not (tmp_path / "kept").exists()
    assert collect(runs, tmp_path / "kept", most_bytes=int(str(refused.value).split()[-1])) > 3000
    assert all(json.loads(line) for line in (tmp_path / "kept" / "nano" / "metrics.jsonl").read_text().splitlines())
