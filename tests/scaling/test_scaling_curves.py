from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcm_scale.commands.scaling import main
from hpcm_scale.errors import UserError
from hpcm_scale.scaling.figures.compute import draw_loss_against_compute
from hpcm_scale.scaling.figures.style import COLOURS
from hpcm_scale.scaling.filters import TRAINING, end, smooth
from hpcm_scale.scaling.runs import find_runs, load_run
from hpcm_scale.tracking.journal import Journal


def make_run(
    folder: Path,
    *,
    model: str = "nano",
    lmbda: float = 0.013,
    steps: int = 120,
    of: int | None = None,
    pflops_per_step: float = 0.006,
    evaluate_every: int = 40,
) -> Path:
    """A run folder as training leaves it, with a noisy falling loss that is NaN now and then."""
    generator = np.random.default_rng(len(folder.name))
    journal = Journal(folder / "metrics.jsonl")
    (folder / "config.yaml").write_text(
        f"model:\n  name: {model}\nobjective:\n  lmbda: {lmbda}\ntrain:\n  steps: {of or steps}\n"
    )
    for step in range(1, steps + 1):
        axes = {"step": step, "time": step / 2, "train/images": 8 * step, "compute/pflops": pflops_per_step * step}
        loss = (1 + 30 / step) * np.exp(0.1 * generator.standard_normal())
        journal.append(axes | {"train/loss": float("nan") if step % 50 == 0 else loss})
        if evaluate_every and step % evaluate_every == 0:
            journal.append(axes | {"eval/loss": 1.1 + 30 / step})
    journal.close()
    return folder


def words(svg: Path) -> list[str]:
    """The texts in a figure; matplotlib keeps each as a comment beside its outlines."""
    return [text.strip() for text in re.findall(r"<!--(.*?)-->", svg.read_text(), flags=re.DOTALL)]


def test_a_run_is_read_from_its_folder_dead_or_alive(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", steps=80, of=2000)
    with (folder / "metrics.jsonl").open("a") as journal:
        journal.write('{"step": 81, "ti')
    run = load_run(folder)
    assert (run.name, run.config["model"]["name"], run.step, run.finished) == ("a", "nano", 80, False)
    compute, loss = run.curve("train/loss")
    assert compute.dtype == loss.dtype == np.float64
    assert compute.size == 79  # step 50 was not finite
    assert np.array_equal(run.curve("eval/loss")[0], [0.006 * 40, 0.006 * 80])
    assert run.curve("eval/psnr")[0].size == 0
    assert load_run(make_run(tmp_path / "b", steps=80)).finished


def test_runs_are_found_once_at_any_depth(tmp_path: Path) -> None:
    for name in ("sweep/b", "sweep/a", "sweep/deep/c", "d"):
        make_run(tmp_path / name, steps=3)
    (tmp_path / "sweep" / "notes").mkdir()
    names = [run.name for run in find_runs([tmp_path / "d", tmp_path / "sweep", tmp_path])]
    assert names == ["d", "a", "b", "c"]


def test_what_is_no_run_is_reported_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        find_runs([tmp_path / "nowhere"])
    assert refused.value.code == "missing-run-path"
    with pytest.raises(UserError) as refused:
        find_runs([tmp_path])
    assert refused.value.code == "no-runs-found"
    Journal(tmp_path / "metrics.jsonl").close()
    with pytest.raises(UserError) as refused:
        find_runs([tmp_path])
    assert (refused.value.code, refused.value.key) == ("not-a-run-folder", "config.yaml")


def test_smoothing_keeps_a_power_law_and_averages_noise() -> None:
    compute = np.arange(1, 20_001) * 0.01
    law = 3 - 0.7 * np.log10(compute)
    place, fit = smooth(compute, law)
    assert np.all(np.diff(place) > 0)
    assert (place[0], place[-1]) == pytest.approx((0.01, 200), rel=0.02)
    assert np.allclose(fit, 3 - 0.7 * np.log10(place), atol=1e-6)  # its ends included
    noisy = law + 0.3 * np.random.default_rng(0).standard_normal(law.size)
    place, fit = smooth(compute, noisy)
    assert np.abs(fit - (3 - 0.7 * np.log10(place)))[place > 50].max() < 0.03
    assert smooth(np.array([0.5]), np.array([2.0])) == (pytest.approx([0.5]), pytest.approx([2.0]))


@pytest.mark.parametrize("compute", [np.zeros(60), np.linspace(9, 1, 60), np.tile(np.arange(30.0), 2)])
def test_compute_that_does_not_grow_ends_no_command(compute: np.ndarray, tmp_path: Path) -> None:
    """Two journals in one file, for example; `hpcm scaling fit` says it."""
    folder = make_run(tmp_path / "odd", steps=len(compute))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["compute/pflops"] = compute[line["step"] - 1]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = load_run(folder)
    draw_loss_against_compute([run], tmp_path / "out.svg")
    assert np.isfinite(end(run, TRAINING, run.step))


def test_the_figure_names_run_axes_units_and_progress(tmp_path: Path) -> None:
    runs = find_runs([make_run(tmp_path / "one", steps=120, of=480)])
    draw_loss_against_compute(runs, tmp_path / "curve.svg")
    texts = words(tmp_path / "curve.svg")
    assert "Loss against compute, λ = 0.013" in texts
    assert {"nano", "eval 1.35, 25% trained"} <= set(texts)
    assert "training compute (PFLOPs; 1 PFLOP = 10¹⁵ floating-point operations)" in texts
    assert "rate-distortion loss" in "\n".join(texts)
    assert "bpp (bits per pixel)" in "\n".join(texts)
    assert {"training", "training, smoothed", "evaluation", "0.1", "0.5"} <= set(texts)


def test_several_runs_are_told_apart(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "nano-a")
    make_run(tmp_path / "runs" / "nano-b", lmbda=0.05, evaluate_every=0)
    make_run(tmp_path / "runs" / "mini", model="mini", pflops_per_step=0.1)
    runs = find_runs([tmp_path / "runs"])
    draw_loss_against_compute(runs, tmp_path / "curves.svg")
    text = "\n".join(words(tmp_path / "curves.svg"))
    for expected in ("compute, λ = 0.013, 0.05", "nano-a\neval 1.35, λ = 0.013", "nano-b\ntrain ", "mini\neval"):
        assert expected in text
    drawn = (tmp_path / "curves.svg").read_text().lower()
    assert all(colour.lower() in drawn for colour in COLOURS[:2])


@pytest.mark.parametrize("steps", [1, 5, 120])
def test_the_png_is_readme_size_and_something_is_drawn(tmp_path: Path, steps: int) -> None:
    runs = find_runs([make_run(tmp_path / "run", steps=steps)])
    draw_loss_against_compute(runs, tmp_path / "figures" / "curve.png")
    with Image.open(tmp_path / "figures" / "curve.png") as picture:
        assert picture.size == (1200, 750)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    blue = np.abs(pixels - [0x00, 0x72, 0xB2]).sum(axis=2) < 30
    assert blue.sum() > (100 if steps == 1 else 500)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["curve.png"]


def test_of_many_runs_the_best_of_each_size_and_lambda_is_named(tmp_path: Path) -> None:
    for index in range(20):
        make_run(tmp_path / "runs" / f"nano{index:02d}", steps=20, evaluate_every=5 if index == 7 else 0)
    make_run(tmp_path / "runs" / "mini", model="mini", steps=20, evaluate_every=20)
    draw_loss_against_compute(find_runs([tmp_path / "runs"]), tmp_path / "curves.svg")
    text = "\n".join(words(tmp_path / "curves.svg"))
    assert "nano, 20 runs\nbest eval 2.60" in text
    assert "mini\neval 2.60" in text
    assert "nano07" not in text and "train 2" not in text


def test_few_runs_of_one_size_have_their_own_colours(tmp_path: Path) -> None:
    for name in ("adam", "muon", "soap"):
        make_run(tmp_path / "runs" / name)
    draw_loss_against_compute(find_runs([tmp_path / "runs"]), tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text().lower()
    assert all(colour.lower() in drawn for colour in COLOURS[:3])
    assert {"adam", "muon", "soap"} <= set(words(tmp_path / "curves.svg"))


def test_the_command_draws_and_prints_the_progress_of_each_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_run(tmp_path / "runs" / "nano")
    make_run(tmp_path / "runs" / "young", steps=0, of=10)
    main(["curves", str(tmp_path / "runs"), "--out", str(tmp_path / "curve.png")])
    printed = capsys.readouterr().out
    assert "nano: step 120 of 120, 0.72 PFLOPs, training loss 1." in printed
    run = load_run(tmp_path / "runs" / "nano")
    assert f"training loss {end(run, TRAINING, 120):.4f} (smoothed)" in printed
    assert "young: step 0 of 10\n" in printed
    assert (tmp_path / "curve.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "COMMAND"),
        (["curves"], "RUN"),
        (["curves", "nowhere"], "does not exist"),
        (["curves", "young"], "no run has a training loss"),
        (["curves", "nano", "--out", "curve.jpeg"], ".png"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_file(tmp_path, monkeypatch, capsys, arguments, reason) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "nano", steps=5)
    make_run(tmp_path / "young", steps=0, of=10)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    reported = capsys.readouterr()
    assert (end.value.code, reported.out, reported.err.count("\n")) == (2, "", 1)
    assert reason in reported.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nano", "young"]


@pytest.mark.launch
def test_it_starts_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hpcm_scale.commands.scaling", "curves", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
