"""Evaluations that fail while two processes train: none costs more than its own journal line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from small_training import SMALL

from hpcm_scale.config.compose import compose
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import UserError
from hpcm_scale.sweeps.jobs import make_job, unfinished
from hpcm_scale.tracking.journal import Journal
from hpcm_scale.training.start import prepare

WEIGHTS = "weights.safetensors"
LITTLE_MEMORY = """
import resource, sys
import psutil
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import entry_point

images = ImageSet(sys.argv[1])
most = psutil.Process().memory_info().vms + 300 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
entry_point(lambda: images.sizes)()
"""


@pytest.fixture
def images(image_folder, tmp_path) -> Path:
    """One image for each of two processes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("kodim01.png", "kodim02.png"):
        Image.open(image_folder / name).crop((0, 0, 256, 256)).save(folder / name)
    return folder


def journal(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(records: list[dict], group: str) -> list[dict]:
    """Of lines of training or evaluation, all that does not depend on the clock or count failures."""
    lines = [record for record in records if f"{group}/loss" in record]
    return [
        {
            key: value
            for key, value in line.items()
            if key != "time" and not key.startswith("perf/") and key != "train/failed_evaluations"
        }
        for line in lines
    ]


@pytest.fixture
def vanish(launch, shards, images, project):
    """`vanish(run, *overrides, weights=[…], averages=[…], memory=[…])`: what a training with such faults ends with."""

    def start(run: str, *overrides: str, **moments: list[int]):
        image, away = images / "kodim02.png", images / "kodim02.away"
        events = {"image": str(image), "rank": 1} | moments
        result = launch(
            *SMALL,
            f"data.shards={shards}",
            f"eval.images={images}",
            f"run.dir={run}",
            *overrides,
            module="vanishing_train",
            VANISH=json.dumps(events),
            PYTHONPATH=str(project / "tests" / "training"),
        )
        if away.exists():
            away.rename(image)
        return result

    return start


def said(result) -> list[str]:
    """The lines that the program itself wrote to stderr."""
    assert "Traceback" not in result.stdout + result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("hpcm: ")]


@pytest.mark.launch
def test_an_image_that_vanishes_costs_its_evaluations_and_nothing_else(vanish, launch):
    """On one process, while the weights and while their averages are evaluated; counted across a resume."""
    options = ("engine=zero2", "train.steps=6", "eval.every=2", "train.checkpoint_every=4", "train.ema=[0.1]")
    assert vanish("sound", *options).returncode == 0
    for stop in ("train.stop_after=4", "train.stop_after=null"):
        result = vanish("faulty", *options, stop, weights=[2], averages=[4])
        assert result.returncode == 0, result.stdout + result.stderr
        if stop == "train.stop_after=4":
            lines = said(result)
            assert [f"the evaluation of step {step} failed and is skipped" in lines[i] for i, step in ((0, 2), (1, 4))]
            assert all("kodim02.png" in line for line in lines) and len(lines) == 2
    sound, faulty = (journal(launch.folder / run) for run in ("sound", "faulty"))
    assert numbers(faulty, "train") == numbers(sound, "train")
    assert numbers(faulty, "eval") == numbers(sound, "eval")[-1:]
    counted = [line["train/failed_evaluations"] for line in faulty if "train/loss" in line]
    assert counted == [0, 0, 1, 1, 2, 2]


@pytest.mark.launch
def test_too_many_in_a_row_end_the_run_with_a_checkpoint_and_it_goes_on(vanish, launch):
    options = ("engine=accelerate", "train.steps=4", "eval.every=1", "eval.max_failed=2", "train.checkpoint_every=100")
    result = vanish("hopeless", *options, weights=[1, 2])
    assert result.returncode == 2, result.stdout + result.stderr
    *skipped, last = said(result)
    assert len(skipped) == 2
    assert "2 evaluations in a row failed, the last one at step 2 (cannot read" in last and "kodim02.png" in last
    assert (launch.folder / "hopeless" / "checkpoints" / "step_00000002" / "complete.json").is_file()
    result = vanish("hopeless", *options, weights=[4])  # the last step: the run is finished all the same
    assert result.returncode == 0 and "resuming from step 2" in result.stdout, result.stdout + result.stderr
    assert len(said(result)) == 1 and (launch.folder / "hopeless" / WEIGHTS).is_file()
    evaluated = [line["step"] for line in journal(launch.folder / "hopeless") if "eval/loss" in line]
    assert evaluated == [3]


@pytest.mark.launch
def test_memory_that_runs_out_in_one_process_skips_the_evaluation(vanish, images, launch):
    """Where weights are whole."""
    Image.new("RGB", (4096, 4096)).save(images / "kodim02.png")
    result = vanish("memory_zero2", "engine=zero2", "train.steps=2", "eval.every=2", memory=[2])
    [line] = said(result)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the evaluation of step 2 failed and is skipped" in line
    assert journal(launch.folder / "memory_zero2")[-1]["step"] == 2


@pytest.mark.launch
def test_with_sharded_weights_it_ends_the_run_which_resumes_after_the_evaluation(vanish, images, launch):
    Image.new("RGB", (4096, 4096)).save(images / "kodim02.png")
    options = ("engine=zero3", "train.steps=3", "eval.every=2", "train.checkpoint_every=2")
    result = vanish("memory_zero3", *options, memory=[2])
    [line] = said(result)
    assert result.returncode == 1 and "remove large images" in line, result.stdout + result.stderr
    Image.new("RGB", (256, 256)).save(images / "kodim02.png")
    result = vanish("memory_zero3", *options)
    assert result.returncode == 0 and "resuming from step 2" in result.stdout, result.stdout + result.stderr
    records = journal(launch.folder / "memory_zero3")
    assert [line["step"] for line in records if "eval/loss" in line] == [3]
    assert records[-2]["train/failed_evaluations"] == 1


@pytest.mark.launch
def test_a_broken_image_is_refused_before_anything_is_written(launch, shards, images):
    shutil.copy(images / "kodim01.png", images / "sound.png")
    (images / "kodim02.png").write_bytes((images / "kodim01.png").read_bytes()[:1000])
    result = launch(
        "model=nano", "train.batch_size=4", f"data.shards={shards}", f"eval.images={images}", "run.dir=broken"
    )
    assert result.returncode == 2, result.stdout + result.stderr
    [line] = said(result)
    assert "kodim02.png" in line
    assert not (launch.folder / "broken").exists()
    limited = compose(["model=nano", f"data.shards={shards}", f"eval.images={images}", "eval.limit=1"])
    assert len(prepare(limited, 1).images) == 1  # the others are not looked at


def test_a_sweep_decodes_its_images_once_for_all_runs(shards, images, monkeypatch, tmp_path):
    """A broken one refuses all of it, and names the first run."""
    read: list[str] = []
    load = ImageSet.load

    def counted(image_set: ImageSet, i: int):
        read.append(image_set.names[i])
        return load(image_set, i)

    monkeypatch.setattr(ImageSet, "load", counted)
    monkeypatch.chdir(tmp_path)

    def jobs():
        for seed in range(3):
            overrides = ["model=nano", f"data.shards={shards}", f"eval.images={images}", f"train.seed={seed}"]
            yield make_job(compose(overrides), overrides, ["train.seed"])

    assert len(unfinished(list(jobs()), 1)) == 3 and sorted(read) == ["kodim01.png", "kodim02.png"]
    (images / "._kodim01.png").write_bytes(b"\0\5\x16\7")
    with pytest.raises(UserError, match=r"train\.seed=0: cannot read .*\._kodim01\.png"):
        unfinished(list(jobs()), 1)


def test_the_line_of_an_evaluation_that_was_cut_off_is_dropped(tmp_path):
    """It is evaluated again: the checkpoint does not know yet that it was."""
    path = tmp_path / "metrics.jsonl"
    position = {"time": 0.0, "train/images": 4, "compute/pflops": 1e-6}
    lines = [{"step": step} | position | line for step, line in ((1, {"eval/loss": 3.0}), (2, {"train/loss": 2.0}))]
    lines.append({"step": 2} | position | {"eval/loss": 2.0})
    for unevaluated, kept in ((False, 3), (True, 2)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        Journal(path).resume(2, unevaluated=unevaluated)
        assert journal(tmp_path) == lines[:kept]


@pytest.mark.parametrize("known", [False, True], ids=["before the start", "since the start"])
def test_an_image_of_another_size_than_at_the_start_is_refused(images, known):
    """Whatever the run is trained for: its numbers would not compare with those before."""
    found = ImageSet(images)
    if known:
        assert [tuple(size) for size in found.sizes] == [(256, 256)] * 2
    Image.new("RGB", (100, 90)).save(images / "kodim02.png")
    assert found.load(0).shape == (3, 256, 256)
    if known:
        with pytest.raises(
            UserError, match=r"kodim02\.png had 256×256 pixels at the start and now has 100×90; restore"
        ):
            found.load(1)
    else:
        assert found.load(1).shape == (3, 90, 100)


@pytest.mark.launch
def test_an_image_that_memory_does_not_hold_is_named(images):
    """In the first decoding, too: a limit on the process's memory stands for a small machine."""
    Image.new("RGB", (9000, 9000)).save(images / "kodim02.png")
    command = [sys.executable, "-c", LITTLE_MEMORY, str(images)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"hpcm: cannot read {images / 'kodim02.png'} (")
