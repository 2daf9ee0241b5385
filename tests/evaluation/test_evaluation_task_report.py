"""`hpcm evaluate --task`: one pass over the images, and what is written of it."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import bjontegaard
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from hpcm_scale.commands import evaluate as command
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.baselines import open_baseline
from hpcm_scale.evaluation.bd_rate import Line
from hpcm_scale.evaluation.curves import Results, read_weights, system_info
from hpcm_scale.machine.agreement import Agreement
from hpcm_scale.machine.evaluation import TaskEvaluation, task_receivers
from hpcm_scale.machine.measures import TaskSection, trained_on
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.machine.report import (
    draw_tasks,
    rising,
    task_bd_rates,
    task_console,
    task_markdown,
    write_task_json,
)
from hpcm_scale.model.weights import load_weights, save_weights

CPU = torch.device("cpu")
SEEN, UNSEEN = "random-vit", "random-vit:1"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(2):
        Image.effect_noise((80, 64), 20 + 40 * i).convert("RGB").save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(save_untrained) -> str:
    """Weights whose facts say that they are of a second training, and that the first saw a receiver."""
    model, facts = load_weights(save_untrained("task"))
    path = Path(save_untrained("task")).with_name("trained.safetensors")
    origin = {"path": "x", "facts": facts | {"receivers": [SEEN], "images": 100, "pflops": 2.0}}
    save_weights(path, model.state_dict(), model.config, facts | {"origin": origin})
    return str(path)


@pytest.fixture(scope="module")
def evaluated(photos, trained, save_untrained, tmp_path_factory) -> tuple[Path, str]:
    """The folder and the terminal of a whole evaluation: a model trained on a receiver, and one that was not."""
    out = tmp_path_factory.mktemp("task") / "out"
    arguments = ["--weights", f"machine={trained}", f"mse={save_untrained('task')}", "--images", str(photos)]
    arguments += ["--task", "agreement", "--receivers", f"{SEEN},{UNSEEN}", "--against", "jpeg", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hpcm evaluate", *arguments, "--device", "cpu", "--visual", "0"])
        patch.setenv("COLUMNS", "80")
        lines = []
        patch.setattr(Console, "print", lambda self, *shown: lines.append((self, shown)))
        command.main()
        patch.undo()
    with (console := Console(width=80, markup=False, highlight=False)).capture() as capture:
        for _, shown in lines:
            console.print(*shown)
    return out, capture.get()


@pytest.mark.launch
def test_everything_is_measured_in_one_pass_and_written(evaluated):
    out, _ = evaluated
    assert sorted(path.name for path in out.iterdir()) == sorted([*command.OUTPUTS, *command.TASK_OUTPUTS])
    tasks = json.loads((out / "task.json").read_text())
    plain = json.loads((out / "evaluation.json").read_text())
    (section,) = tasks["sections"]
    assert [curve["name"] for curve in section["curves"]] == ["machine", "mse", "jpeg"]
    for curve, same in zip(section["curves"], plain["curves"], strict=True):
        for point, other in zip(curve["points"], same["points"], strict=True):
            assert point["mean"] == other["mean"]
            for image, measured in zip(point["images"], other["images"], strict=True):
                assert {key: image[key] for key in measured} == measured  # seconds, too: coded once
                assert set(image["tasks"]) == {f"agreement/{SEEN}", f"agreement/{UNSEEN}"}
            for name, mean in point["tasks"].items():
                values = [image["tasks"][name]["token_cosine"] for image in point["images"]]
                assert mean["token_cosine"] == pytest.approx(np.mean(values))
    jpeg = [point["tasks"][f"agreement/{UNSEEN}"]["token_cosine"] for point in section["curves"][2]["points"]]
    assert jpeg[-1] > jpeg[0] and jpeg[-1] > 0.9


@pytest.mark.launch
def test_what_was_trained_on_a_receiver_is_marked(evaluated):
    out, terminal = evaluated
    measures = json.loads((out / "task.json").read_text())["sections"][0]["measures"]
    assert [measure["trained_on_by"] for measure in measures] == [["machine"], []]
    rows = list(csv.DictReader((out / "task.csv").open(encoding="utf-8")))
    assert len(rows) == 2 * 2 * (1 + 1 + len(open_baseline("jpeg").settings))
    assert {row["codec"] for row in rows if row["trained on it"] == "True"} == {"machine"}
    assert {row["receiver"] for row in rows if row["trained on it"] == "True"} == {SEEN}
    text = (out / "task.md").read_text()
    for shown in (text, terminal):
        assert shown.count("Trained on this receiver: machine") == 1 and shown.count("machine †") == 1
        assert "No codec in this table was trained on this receiver." in shown


@pytest.mark.launch
def test_costs_stand_beside_every_number(evaluated):
    text = (evaluated[0] / "task.md").read_text()
    ours = [line for line in text.splitlines() if line.startswith(("| machine", "| mse"))]
    assert [line.split(" | ")[-4:] for line in ours[:2]] == [
        ["210,719", "3.6", "140", "2.500 |"],  # with the training before
        ["210,719", "3.6", "40", "0.500 |"],
    ]
    assert text.count("machine has 1 point, but a BD-rate needs 3") == 2  # once for each receiver


@pytest.mark.launch
def test_the_terminal_of_80_columns_is_enough(evaluated):
    _, terminal = evaluated
    assert max(map(len, terminal.splitlines())) <= 80 and "…" not in terminal
    assert "token" in terminal and "rank" not in terminal and "Pairs of curves without a BD-rate: 8 of 8" in terminal


@pytest.fixture(scope="module")
def section(photos, trained) -> TaskSection:
    """JPEG and WebP, whose points are made those of models, so that they have BD-rates."""
    from hpcm_scale.data.sources import ImageSet

    images = ImageSet(photos)
    results = Results(str(photos), None, 2, [], system_info())
    section = TaskSection(results, images, [Agreement(receiver(SEEN), CPU)])
    section.prepare()
    for _ in section.code([], [open_baseline("jpeg"), open_baseline("webp")], device=CPU):
        pass
    jpeg, webp = section.results.curves
    facts = load_weights(trained)[1]
    ours = replace(webp, name="ours", points=[replace(p, weights=trained, facts=facts) for p in webp.points])
    section.results.curves[:] = [ours, jpeg]
    return section


def test_bd_rates_are_those_of_the_library_on_the_scale_of_the_metric(section):
    (measure,) = section.measures
    ours, jpeg = section.results.curves
    found = list(task_bd_rates(section.results.curves, measure))
    assert [(each.metric.key, each.curve, each.anchor) for each in found] == [
        ("token_cosine", ours, jpeg),
        ("token_distortion", ours, jpeg),
    ]
    columns = []
    for curve in (jpeg, ours):
        means = [np.mean([s["token_cosine"] for s in measure.scores_of(p)]) for p in curve.points]
        line = rising(Line("", [p.mean["bpp"] for p in curve.points], [-10 * np.log10(1 - mean) for mean in means]))
        columns += [line.rates, line.qualities]
    expected = bjontegaard.bd_rate(*columns, "pchip", require_matching_points=False, min_overlap=0)
    assert found[0].found.bd_rate == pytest.approx(expected, abs=1e-9)
    assert f"| token cosine | ours 4:2:0 | {expected:+.1f}% |" in task_markdown([section])


def test_points_no_better_than_a_cheaper_one_are_left_out():
    line = Line("x", [0.4, 0.1, 0.2, 0.2, 0.8], [3.0, 1.0, 3.0, 2.0, 4.0])
    assert rising(line) == Line("x", [0.1, 0.2, 0.8], [1.0, 3.0, 4.0])
    flat = Line("x", [1, 2], [100.0, 100.0])
    assert rising(flat).rates == [1]


def test_the_plot_has_a_panel_per_receiver_and_metric(section, tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    draw_tasks([section], tmp_path / "task.png")
    (figure,) = figures
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "token cosine, −10·log10(1 − cosine) (dB)",
        "token distortion, −10·log10 (dB)",
    ]
    for axes in figure.axes:
        assert "bits per pixel" in axes.get_xlabel() and "used in training by ours" in axes.get_title()
        ours, jpeg = axes.lines
        assert ours.get_markerfacecolor() == "white" != jpeg.get_markerfacecolor()
        assert ours.get_xdata().tolist() == [p.mean["bpp"] for p in section.results.curves[0].points]
    assert "hollow markers" in figure.get_suptitle()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours 4:2:0", "jpeg 4:2:0"]


def test_text_of_a_folder_is_scored_with_its_uncoded_images(tmp_path, section):
    """A folder with labels, and the scanned page beside it."""
    picture = Image.new("RGB", (120, 40), "white")
    picture.save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,text\na.png,nothing\n")
    tasks = TaskEvaluation(["text"], ["pp-ocrv4"], CPU)
    page, labelled = tasks.text_sections(str(tmp_path), 0)
    assert page.results.title == "scanned page of scikit-image, 1 image" and len(page.digest) == 64
    labelled.prepare()
    (reading,) = labelled.measures
    assert reading.originals == {"cer": 1.0, "errors": 7, "characters": 7}
    jpeg = open_baseline("jpeg")
    jpeg.settings = (5, 50)
    for curve in labelled.code([], [jpeg], device=CPU):
        assert [reading.mean_of(point)["cer"] for point in curve.points] == [1.0, 1.0]
        assert not trained_on(curve, "pp-ocrv4")
    assert "Uncoded images: CER 1.0000, errors 7, characters 7." in task_markdown([labelled])
    draw_tasks([labelled], tmp_path / "task.png")
    write_task_json([labelled], tmp_path / "task.json")
    console = Console(width=80)
    with console.capture() as capture:
        console.print(task_console([labelled]))
    assert "errors" in capture.get()
    with pytest.raises(UserError) as error:
        tasks.text_sections(str(tmp_path / "none"), 0)
    assert error.value.code == "unreadable-labels"


def test_receivers_go_to_the_task_they_can_do():
    named = task_receivers(["agreement", "text"], ["pp-ocrv4", SEEN])
    assert {task: [each.name for each in receivers] for task, receivers in named.items()} == {
        "agreement": [SEEN],
        "text": ["pp-ocrv4"],
    }
    alone = task_receivers(["agreement"], ["pp-ocrv4"])
    assert [each.name for each in alone["agreement"]] == ["pp-ocrv4"]
    with pytest.raises(UserError, match="there is no receiver 'efficientnet'"):
        task_receivers(["agreement"], ["efficientnet"])


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["--task", "agrement"], "there is no task 'agrement'; choose from agreement, text"),
        (["--task", "agreement", "--receivers", "vit"], "there is no receiver 'vit'"),
        (["--task", "text", "--receivers", "random-vit", "--images"], "random-vit does not read text"),
        (["--task", "text"], "cannot read PHOTOS/labels.csv"),
        (["--task", "agreement", "--estimate"], "--task needs images decoded from files; omit --estimate"),
        (["--receivers", "random-vit"], "--receivers needs --task"),
        (["--task", "text", "--text-images", "-1"], "--text-images: -1 must be at least 0"),
        (["--task", "text", "--set", "kodak"], "--set has no effect with only --task text"),
        (["--task", "agreement", "--images"], "--images is missing; give a folder of images"),
        (["--task", "agreement", "--against", "jpeg", "--weights", "jpeg=WEIGHTS"], "has the name of a codec"),
    ],
)
def test_mistakes_are_reported_in_a_sentence(arguments, reported, photos, trained, tmp_path, monkeypatch, capsys):
    typed = [argument.replace("WEIGHTS", trained) for argument in arguments]
    if typed[-1] == "--images":
        typed.pop()
    else:
        typed += ["--images", str(photos)]
    typed += [] if "--weights" in typed else ["--weights", trained]
    monkeypatch.setattr(sys, "argv", ["hpcm evaluate", *typed, "--out", str(tmp_path / "out"), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    written = capsys.readouterr()
    assert ended.value.code == 2 and written.out == "" and written.err.count("\n") == 1
    assert reported.replace("PHOTOS", str(photos)) in written.err and not (tmp_path / "out").exists()


def test_images_too_small_for_receivers_are_refused_before_any_is_coded(trained, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (90, 20)).save(tmp_path / "low.png")
    typed = ["--weights", trained, "--images", str(tmp_path), "--task", "agreement", "--receivers", SEEN]
    monkeypatch.setattr(sys, "argv", ["hpcm evaluate", *typed])
    with pytest.raises(SystemExit):
        command.main()
    assert "low.png is 90×20 pixels, but receivers need images with sides of at least 32" in capsys.readouterr().err


def test_weights_of_one_architecture_are_two_curves_by_name(trained, save_untrained):
    groups = read_weights([f"machine={trained}", f"mse={save_untrained('task')}"])
    assert [group[0].curve for group in groups] == ["machine", "mse"]
