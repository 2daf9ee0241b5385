from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from hpcm_scale.config.compose import compose, to_yaml
from hpcm_scale.errors import UserError
from hpcm_scale.model.parameters import on_meta, parameter_count
from hpcm_scale.scaling.observations import study
from hpcm_scale.scaling.runs import Run, find_runs, load_run

FLOPS_PER_IMAGE = 3e9
"""Of the journals made here: what a run counted is believed, not counted again."""


def journal(
    steps: Sequence[int],
    *,
    rate: dict[int, float] | None = None,
    evaluate_every: int = 20,
    batch: int = 8,
    flops: float = FLOPS_PER_IMAGE,
    lift: float = 0.0,
) -> list[dict[str, Any]]:
    """Lines of a run without noise; `rate` gives the learning rate from a step on."""
    lines = []
    for step in steps:
        images = step * batch
        axes = {"step": step, "time": step / 2, "train/images": images, "compute/pflops": images * flops / 1e15}
        learning_rate = [value for start, value in (rate or {0: 1e-3}).items() if start <= step][-1]
        loss = 1 + lift + 30 / step
        lines.append(axes | {"train/loss": loss, "train/bpp": loss / 4, "train/learning_rate": learning_rate})
        if evaluate_every and step % evaluate_every == 0:
            lines.append(axes | {"eval/loss": loss + 0.1, "eval/bpp": loss / 5, "eval/psnr": 30.0})
    return lines


def write(folder: Path, lines: list[dict[str, Any]], *overrides: str) -> Path:
    """A run folder with these lines, its configuration by Hydra."""
    defaults = ["model=nano", "schedule.learning_rate=1e-3", "train.steps=100", "eval.images=kodak"]
    folder.mkdir(parents=True)
    config = compose([*defaults, *overrides])
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def edit(run: Run, key: str, value: Any) -> Run:
    """Change one key of a run's configuration in its folder."""
    section, name = key.split(".")
    text = (run.folder / "config.yaml").read_text()
    config = OmegaConf.create(text)
    config[section][name] = value
    OmegaConf.save(config, run.folder / "config.yaml")
    return load_run(run.folder)


def test_a_run_becomes_a_curve_and_an_observation(tmp_path: Path) -> None:
    lines = journal(range(1, 101), rate={0: 1e-3, 61: 3e-4, 81: 1e-4})
    reported = study(find_runs([write(tmp_path / "a", lines, "train.seed=3", "data.crop=256")]))
    assert (reported.metric, reported.lmbda, reported.excluded, reported.notes) == ("eval/loss", 0.013, [], [])
    [curve], [seen] = reported.curves, reported.observations
    assert (seen.run, seen.model, seen.seed, seen.images, seen.finished) == ("a", "nano", 3, 800, True)
    model = on_meta(compose(["model=nano"]).model)
    assert seen.parameters == curve.parameters == parameter_count(model)
    assert seen.pixels == 800 * 256**2
    assert seen.pflops == pytest.approx(800 * FLOPS_PER_IMAGE / 1e15, rel=1e-12)
    assert seen.flops_per_pixel == pytest.approx(FLOPS_PER_IMAGE / 256**2, rel=1e-12)
    assert (seen.loss, seen.bpp, seen.psnr) == (1.3 + 0.1, 1.3 / 5, 30.0)
    assert curve.pixels.tolist() == [8 * step * 256**2 for step in (20, 40, 60, 80, 100)]
    assert curve.learning_rate.tolist() == [1e-3, 1e-3, 1e-3, 3e-4, 1e-4]
    assert curve.annealed.tolist() == [False, False, False, False, True]
    assert seen.annealed and seen.cooldown_of is None
    assert curve.loss == pytest.approx([1.1 + 30 / step for step in (20, 40, 60, 80, 100)])
    for name in ("pflops", "pixels", "loss", "smoothed", "learning_rate"):
        assert getattr(curve, name).dtype == np.float64 and getattr(curve, name).shape == (5,)


def test_training_losses_are_smoothed(tmp_path: Path) -> None:
    lines = journal(range(1, 2001), evaluate_every=0)
    noise = np.random.default_rng(0).standard_normal((2, 2000))
    for line, of_loss, of_bpp in zip(lines, *noise, strict=True):
        line["train/loss"] *= 1 + 0.1 * of_loss
        line["train/bpp"] *= 1 + 0.1 * of_bpp
    reported = study(find_runs([write(tmp_path / "a", lines, "eval.images=null", "train.steps=2000")]))
    assert reported.metric == "train/loss"
    [curve], [seen] = reported.curves, reported.observations
    assert curve.loss.size == 2000
    true = 1 + 30 / np.arange(1, 2001)
    assert np.abs(curve.smoothed / true - 1)[500:].max() < 0.04
    assert seen.loss == curve.smoothed[-1] != curve.loss[-1]
    assert seen.bpp == pytest.approx(true[-1] / 4, rel=0.04)
    assert seen.psnr is None


def test_exclusions_have_reasons(tmp_path: Path) -> None:
    whole = journal(range(1, 101))
    write(tmp_path / "whole", whole)
    write(tmp_path / "young", [])
    write(tmp_path / "unevaluated", journal(range(1, 11)))
    write(tmp_path / "other", whole, "objective.lmbda=0.05")
    write(tmp_path / "diverged", [line | ({"eval/loss": None} if "eval/loss" in line else {}) for line in whole])
    write(tmp_path / "merged", [*whole, *journal(range(101, 141), batch=4)])
    edit(load_run(write(tmp_path / "foreign", whole)), "model.channels", [8, 16])
    sparse = journal(range(1, 101), lift=0.02)
    sparse = [line | ({"eval/loss": None} if line["step"] == 40 and "eval/loss" in line else {}) for line in sparse]
    write(tmp_path / "sparse", sparse)
    write(tmp_path / "resumed", [*journal(range(1, 101), lift=0.01)[:70], *journal(range(31, 101), lift=0.01)])
    write(tmp_path / "whole-too", whole[: -len(journal(range(61, 101)))])
    runs = find_runs([tmp_path])
    reported = study(runs, lmbda=0.013)
    assert [seen.run for seen in reported.observations] == ["resumed", "sparse", "whole"]
    sentences = dict(sorted((sentence.split()[0].rstrip(":"), sentence) for sentence in reported.excluded))
    assert list(sentences) == [
        "diverged",
        "foreign",
        "merged",
        "other",
        "resumed",
        "sparse",
        "unevaluated",
        "whole-too",
        "young",
    ]
    assert sentences["young"] == "young is excluded: it has no line yet"
    assert sentences["unevaluated"] == "unevaluated is excluded: it has no evaluation yet"
    assert sentences["other"] == "other is excluded: its λ is 0.05, not 0.013"
    assert sentences["diverged"] == "diverged is excluded: its eval/loss was never finite"
    assert "do not grow from step 100 to 120" in sentences["merged"]
    assert "channels" in sentences["foreign"]
    assert sentences["whole-too"] == "whole-too is excluded: it is a copy of whole"
    assert sentences["sparse"] == "sparse: 1 line has no finite eval/loss and is excluded"
    assert sentences["resumed"] == "resumed: 2 lines have the step of a later line, which is used instead"
    resumed, sparse, whole = reported.curves
    assert resumed.loss == pytest.approx(whole.loss + 0.01) and np.array_equal(resumed.pflops, whole.pflops)
    assert sparse.loss == pytest.approx(whole.loss[[0, 2, 3, 4]] + 0.02)
    [note] = reported.notes
    assert note.startswith("resumed and sparse and whole have one model, seed and amount of data")
    assert study(runs[::-1], lmbda=0.013).excluded == reported.excluded
    assert study(runs[::-1], lmbda=0.013).observations == reported.observations


def test_of_repeated_steps_the_later_line_counts(tmp_path: Path) -> None:
    first, second = journal(range(1, 61)), journal(range(41, 101))
    for line in second:
        line.update({key: value + 0.1 for key, value in line.items() if key.endswith("/loss")})
    [curve] = study(find_runs([write(tmp_path / "a", [*first, *second])])).curves
    assert curve.loss == pytest.approx([1.1 + 30 / 20, 1.1 + 30 / 40, 1.2 + 30 / 60, 1.2 + 30 / 80, 1.2 + 30 / 100])


def test_training_lines_may_be_too_few(tmp_path: Path) -> None:
    write(tmp_path / "short", journal(range(1, 20)))
    write(tmp_path / "long", journal(range(1, 21)))
    reported = study(find_runs([tmp_path]), metric="train/loss")
    assert [seen.run for seen in reported.observations] == ["long"]
    assert reported.excluded == [
        "short is excluded: 19 training lines are too few to smooth; 20 are needed: train longer"
    ]


@pytest.mark.parametrize(("every", "reported"), [(1, "longer"), (100, "longer or with a lower log.every (it is 100)")])
def test_too_few_training_lines_name_what_to_change(tmp_path: Path, every: int, reported: str) -> None:
    write(tmp_path / "short", journal(range(1, 2)), f"log.every={every}")
    sentence = f"1 training line is too few to smooth; 20 are needed: train {reported}"
    with pytest.raises(UserError, match=re.escape(f"{sentence}); ")):
        study(find_runs([tmp_path]), metric="train/loss")


def test_the_metric_is_what_every_run_has(tmp_path: Path) -> None:
    write(tmp_path / "a", journal(range(1, 101)))
    young = write(tmp_path / "b", journal(range(1, 11)))  # to be evaluated, and not yet
    assert study(find_runs([tmp_path])).metric == "eval/loss"
    edit(load_run(young), "eval.images", None)
    write(tmp_path / "c", journal(range(1, 81), evaluate_every=0, lift=0.01), "eval.images=null")
    reported = study(find_runs([tmp_path]))
    assert reported.metric == "train/loss"
    assert [seen.run for seen in reported.observations] == ["c", "a"]
    assert [seen.finished for seen in reported.observations] == [False, True]


def test_several_lambdas_need_a_choice(tmp_path: Path) -> None:
    for lmbda in (0.013, 0.05):
        write(tmp_path / f"{lmbda}", journal(range(1, 101)), f"objective.lmbda={lmbda}")
    runs = find_runs([tmp_path])
    with pytest.raises(UserError, match=r"several λ \(0\.013, 0\.05\)") as refused:
        study(runs)
    assert (refused.value.code, refused.value.key) == ("several-lambdas", "--lmbda")
    assert [seen.lmbda for seen in study(runs, lmbda=0.05).observations] == [0.05]
    with pytest.raises(UserError) as refused:
        study(runs, lmbda=0.1)
    assert (refused.value.code, refused.value.key) == ("absent-lambda", "--lmbda")
    with pytest.raises(UserError) as refused:
        study(runs, metric="eval/psnr")
    assert (refused.value.code, refused.value.key) == ("unknown-loss", "--metric")
    young = find_runs([write(tmp_path / "young", [])])
    with pytest.raises(UserError, match="young is excluded: it has no line yet"):
        study(young)


@pytest.mark.parametrize(
    ("overrides", "rate", "expected"),
    [
        (["schedule.warmup=30"], {0: 5e-5, 31: 1e-3}, [False] * 5),  # low because it has not risen yet
        (["schedule.warmup=30"], {0: 5e-5, 31: 1e-3, 61: 1e-4}, [False, False, False, True, True]),
        ([], {0: 1e-3, 100: 0.0}, [False, False, False, False, True]),
        (["schedule.factors=[0.1,0.05,0.01,0.005]"], {0: 1e-4, 61: 1e-5}, [False, False, False, True, True]),
    ],
)
def test_annealed_means_decayed_from_the_peak(
    tmp_path: Path, overrides: list[str], rate: dict[int, float], expected: list[bool]
) -> None:
    [curve] = study(find_runs([write(tmp_path / "a", journal(range(1, 101), rate=rate), *overrides)])).curves
    assert curve.annealed.tolist() == expected


def test_an_evaluation_has_the_rate_of_the_line_before_it(tmp_path: Path) -> None:
    lines = journal(range(1, 101), rate={0: 1e-3, 50: 1e-4})
    sparse = [line for line in lines if "eval/loss" in line or line["step"] in (30, 50, 70)]
    [curve] = study(find_runs([write(tmp_path / "a", sparse)])).curves
    assert math.isnan(curve.learning_rate[0])
    assert curve.learning_rate[1:].tolist() == [1e-3, 1e-4, 1e-4, 1e-4]
    assert curve.annealed.tolist() == [False, False, True, True, True]


def test_a_cooldown_is_an_observation_of_its_own(tmp_path: Path) -> None:
    trunk = write(tmp_path / "ladder" / "nano", journal(range(1, 91)), "run.sweep=ladder")
    write(tmp_path / "elsewhere" / "nano", journal(range(1, 101), lift=0.01), "run.sweep=ladder")
    decaying = journal(range(51, 71), rate={0: 1e-3, 61: 1e-5}, evaluate_every=10)
    branch = load_run(write(tmp_path / "ladder" / "nano-at-50", decaying, "train.steps=70", "run.sweep=ladder"))
    edit(branch, "run.cooldown_of", str(trunk))
    reported = study(find_runs([tmp_path]))
    assert [(seen.run, seen.annealed, seen.finished, seen.cooldown_of) for seen in reported.observations] == [
        ("nano-at-50", True, True, "ladder/nano"),
        ("ladder/nano", False, False, None),
        ("elsewhere/nano", False, True, None),
    ]
    assert reported.group == "ladder" and reported.project == "hpcm_scale"
    curve = reported.curves[0]
    assert curve.pflops == pytest.approx([8 * step * FLOPS_PER_IMAGE / 1e15 for step in (60, 70)])
    assert reported.observations[0].flops_per_pixel == reported.observations[2].flops_per_pixel
    edit(branch, "run.cooldown_of", "/moved/since/ladder/nano")  # a copy of the ladder on another machine
    assert study(find_runs([tmp_path])).observations[0].cooldown_of == "ladder/nano"
    assert study(find_runs([branch.folder])).observations[0].cooldown_of == "nano"


def test_runs_that_may_not_be_compared_are_reported(tmp_path: Path) -> None:
    write(tmp_path / "a", journal(range(1, 101)), "eval.images=/here/kodak")
    other = ("eval.images=/there/kodak", "run.sweep=other", "train.seed=1")
    write(tmp_path / "b", journal(range(1, 101), lift=0.01), *other)
    reported = study(find_runs([tmp_path]))
    assert (reported.notes, reported.group) == ([], None)
    assert reported.recipe["schedule.learning_rate"] == 1e-3 and reported.recipe["data.crop"] == 256
    write(tmp_path / "c", journal(range(1, 101), lift=0.02), "eval.images=clic", "data.crop=512")
    assert "data.crop" not in study(find_runs([tmp_path])).recipe
    assert study(find_runs([tmp_path])).notes == [
        "the runs differ in data.crop (256, 512): their losses may not be comparable",
        "the runs differ in eval.images (clic, kodak): their losses may not be comparable",
    ]


def test_crops_that_grow_leave_the_pixels_of_a_step(tmp_path: Path) -> None:
    lines = journal(range(1, 101))
    for line in lines[-24:]:  # the last 20 steps and their evaluations
        line["train/images"] = 640 + (line["step"] - 80) * 2
    growing = ("train.batch_size=8", "schedule.crops=[512]", "schedule.crop_boundaries=[0.8]")
    write(tmp_path / "growing", lines, *growing, "train.seed=1")
    lifted = [line | {key: value + 0.01 for key, value in line.items() if key.endswith("/loss")} for line in lines]
    write(tmp_path / "growing-too", lifted, *growing)
    write(tmp_path / "plain", journal(range(1, 101), lift=0.02), "train.batch_size=8", "train.seed=2")
    reported = study(find_runs([tmp_path]))
    assert {seen.run: seen.images for seen in reported.observations} == {
        "growing": 680,
        "growing-too": 680,
        "plain": 800,
    }
    assert all(seen.pixels == 800 * 256**2 for seen in reported.observations)
    assert all(
        curve.pixels.tolist() == [8 * step * 256**2 for step in (20, 40, 60, 80, 100)] for curve in reported.curves
    )
    assert reported.notes == ["the runs differ in schedule.crops ([512], []): their losses may not be comparable"]
    alone = study(find_runs([tmp_path / "growing", tmp_path / "growing-too"]), metric="train/loss")
    assert alone.notes == ["the training crops of growing, growing-too change during training, and the loss with them"]


def test_losses_of_other_objectives_are_not_mixed_in(tmp_path: Path) -> None:
    lines = journal(range(1, 101))
    write(tmp_path / "plain", lines)
    write(tmp_path / "variable", lines, "model.rate.levels=6")
    write(tmp_path / "started", lines, "init_from=runs/other")
    write(tmp_path / "machine", lines, "objective.target=vision_model", "machine.receivers=[random-vit]")
    reported = study(find_runs([tmp_path]))
    assert [seen.run for seen in reported.observations] == ["plain"]
    assert [sentence.split(" is excluded: ")[1].split()[1] for sentence in reported.excluded] == [
        "is",
        "started",
        "has",
    ]
    write(tmp_path / "ms_ssim", lines, "objective=ms_ssim")
    write(tmp_path / "fine", lines, "objective=ms_ssim", "init_from=runs/other")
    similar = study(find_runs([tmp_path]), lmbda=8.73)
    assert ([seen.run for seen in similar.observations], similar.distortion) == (["ms_ssim"], "ms_ssim")
    assert [sentence for sentence in similar.excluded if sentence.startswith("fine")] == [
        "fine is excluded: it started from trained weights, whose compute is not in its journal"
    ]
    mixed = study(
        find_runs([tmp_path / "plain", write(tmp_path / "same", lines, "objective=ms_ssim", "objective.lmbda=0.013")])
    )
    assert (mixed.distortion, [seen.run for seen in mixed.observations]) == ("mse", ["plain"])
    assert mixed.excluded == ["same is excluded: it is trained for MS-SSIM, with another loss"]
    alone = study(find_runs([tmp_path / "variable"]))  # among their like they do compare
    assert [seen.run for seen in alone.observations] == ["variable"]


def test_averages_of_the_weights_have_curves_of_their_own(tmp_path: Path) -> None:
    lines = journal(range(1, 101))
    for line in lines:
        if "eval/loss" in line:
            line |= {"eval_ema_0.05/loss": line["eval/loss"] - 0.25, "eval_ema_0.05/psnr": 30.0}
    write(tmp_path / "averaged", lines)
    write(tmp_path / "plain", journal(range(1, 101), lift=0.1))
    runs = find_runs([tmp_path])
    reported = study(runs, metric="eval_ema_0.05/loss")
    raw = {seen.run: seen.loss for seen in study(runs).observations}
    assert [seen.run for seen in reported.observations] == ["averaged"]
    assert reported.observations[0].loss == pytest.approx(raw["averaged"] - 0.25)
    assert reported.observations[0].psnr == pytest.approx(30)
    assert "plain is excluded: it has no eval_ema_0.05/loss" in reported.excluded
