"""`hpcm scaling` as it is typed: what it writes and prints, and its mistakes."""

from __future__ import annotations

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
from known_ladder import write_ladder, write_run
from mistakes import mistake_in

from hpcm_scale.commands.scaling import main
from hpcm_scale.model.ladder import compose_sized
from hpcm_scale.scaling.analysis import read_laws
from hpcm_scale.scaling.findings import summary


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


mistake = partial(mistake_in, main)


@pytest.mark.launch
def test_fit_plan_and_collect_one_after_the_other(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    runs = write_ladder(tmp_path / "ladder", ("nano", "micro", "mini"))
    main(["fit", str(runs), "--out", str(tmp_path / "fit")])
    printed = capsys.readouterr().out
    analysis = read_laws(tmp_path / "fit")
    assert [point.run for point in analysis.observations if not point.annealed] == ["nano", "micro", "mini"]
    first = files(tmp_path / "fit")
    assert len(first) == 10  # report.md, laws.json, four figures as PNG and SVG
    for name in re.findall(r"\]\((.+?)\)", first["report.md"].decode()):
        assert name in first
    assert all(point.run in printed for point in analysis.observations)
    assert all(sentence in printed for sentence in summary(analysis))
    assert "Caveat: " in printed
    assert str(tmp_path) not in first["laws.json"].decode() + first["report.md"].decode()

    main(["collect", str(runs), "--out", str(tmp_path / "kept")])
    size = sum(map(len, files(tmp_path / "kept").values()))
    assert f"12 runs, {size:,} bytes" in capsys.readouterr().out

    main(["plan", "--laws", str(tmp_path / "fit" / "laws.json"), "--pflops", "0.05", "--gpus", "64"])
    command = capsys.readouterr().out.splitlines()[-1]
    assert compose_sized([word for word in shlex.split(command) if "=" in word]).train.batch_size == 64
    main(["plan", "--laws", str(tmp_path / "fit"), "--days", "0.01", "--gpus", "64", "--gpu", "h100"])
    assert "there is no command" in capsys.readouterr().out
    main(["plan", "--laws", str(tmp_path / "fit"), "--target-loss", "1.4", "--json"])
    assert json.loads(capsys.readouterr().out)["loss"][0] == pytest.approx(1.4)


@pytest.mark.launch
def test_training_losses_and_unfinished_runs_can_be_fitted_too(tmp_path, capsys) -> None:
    for model, done in (("nano", 400), ("micro", 400), ("mini", 300)):
        write_run(tmp_path / "runs" / model, model, 400, done=done, evaluate_every=1000)
    (tmp_path / "runs" / "young").mkdir()
    (tmp_path / "runs" / "young" / "config.yaml").write_text((tmp_path / "runs" / "nano" / "config.yaml").read_text())
    (tmp_path / "runs" / "young" / "metrics.jsonl").write_text("")
    main(
        ["fit", str(tmp_path / "runs"), "--out", str(tmp_path / "fit"), "--metric", "train/loss", "--extrapolate", "1"]
    )
    printed = capsys.readouterr().out
    assert "no, unfinished" in printed
    assert "young is excluded: it has no line yet" in printed
    assert "Caveat: no learning rate had decayed" in printed
    report = (tmp_path / "fit" / "report.md").read_text()
    assert "- young is excluded: it has no line yet." in report
    assert "no, unfinished" in report


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["fit", "runs"], "--out"),
        (["fit", "nowhere", "--out", "fit"], "does not exist"),
        (["fit", "runs/nano", "--out", "fit"], "two runs"),
        (["fit", "runs", "--out", "fit", "--metric", "eval/psnr"], "--metric"),
        (["fit", "runs", "--out", "fit", "--lmbda", "0.1"], "0.013"),
        (["fit", "runs", "--out", "fit", "--level", "95"], "level"),
        (["fit", "runs", "--out", "fit", "--extrapolate", "0.5"], "--extrapolate"),
        (["fit", "runs", "--out", "a_file/fit"], "cannot write"),
        (["plan", "--laws", "nowhere", "--pflops", "1"], "nowhere"),
        (["plan", "--laws", "nowhere"], "--pflops"),
        (["plan", "--laws", "nowhere", "--days", "1", "--gpu", "abacus"], "abacus"),
        (["plan", "--laws", "nowhere", "--days", "1", "--pflops", "1"], "not allowed"),
        (["publish", "runs"], "hpcm scaling fit"),
        (["collect", "runs", "--out", "a_file/kept"], "cannot write"),
        (["collect", "runs", "--out", "kept", "--every", "0"], "--every"),
        (["collect", "runs", "--out", "kept", "--most-bytes", "100"], "--most-bytes"),
        (["guess", "runs"], "COMMAND"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments, reason, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for model in ("nano", "micro"):
        write_run(tmp_path / "runs" / model, model, 60)
    (tmp_path / "a_file").write_text("")
    before = files(tmp_path)
    assert reason in mistake(capsys, *arguments)
    assert files(tmp_path) == before


@pytest.mark.parametrize("loss", [1.25, 0.0, -1.0, None])
def test_runs_whose_losses_are_all_the_same_are_drawn_and_fitted(tmp_path, capsys, loss) -> None:
    for model in ("nano", "micro", "mini"):
        journal = write_run(tmp_path / "runs" / model, model, 100, decay=0.2) / "metrics.jsonl"
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        lines = [line | {key: loss for key in line if key.endswith("/loss")} for line in lines]
        journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fit = ["fit", str(tmp_path / "runs"), "--out", str(tmp_path / "fit")]
    curves = ["curves", str(tmp_path / "runs"), "--out", str(tmp_path / "curves.png")]
    if loss == 1.25:
        main(fit)
        assert "are equal and do not depend on N" in " ".join(capsys.readouterr().out.split())
        laws = json.loads((tmp_path / "fit" / "laws.json").read_text(), parse_constant=pytest.fail)
        assert laws["laws"] == {} and "are equal" in (tmp_path / "fit" / "report.md").read_text()
    else:
        assert "no run is usable (" in mistake(capsys, *fit)
    if loss is None:
        assert "no run has a training loss" in mistake(capsys, *curves)
    else:
        main(curves)
        assert (tmp_path / "curves.png").is_file()
