"""Moving averages of the weights: their profile, under every engine, over resumes, and of lengths chosen afterwards."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from hpcm_scale.commands.ema import main as average_command
from hpcm_scale.config.checks import check
from hpcm_scale.config.compose import compose, from_yaml, to_yaml
from hpcm_scale.config.schema import AVERAGE, OptimizerConfig, RunConfig
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.estimate import evaluate
from hpcm_scale.model.weights import load_weights, read_weights_file
from hpcm_scale.objective import RateDistortionObjective
from hpcm_scale.training.ema import EMA, FINEST, ema_kind, exponent, previous_update
from hpcm_scale.training.engines.accelerate import AccelerateEngine
from hpcm_scale.training.post_hoc_ema import MAX_ERROR, Profile, coefficients
from hpcm_scale.training.state_shards import StateShard, open_state

pytestmark = pytest.mark.launch

LENGTHS = (0.1, 0.25)
STEPS = 3
SHORT = (f"train.steps={STEPS}", f"train.ema={list(LENGTHS)}", "train.checkpoint_every=1", "train.keep_every=1")
WEIGHTS = "weights.safetensors"
FILES = (WEIGHTS, *(f"weights_ema_{length}.safetensors" for length in LENGTHS))
RUNS = ("zero0", "zero1", "zero2", "zero3", "rolled_back")

some_lengths = st.floats(0.01, 0.999 * AVERAGE.below)


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A folder with one."""
    folder = tmp_path_factory.mktemp("photo")
    Image.effect_noise((128, 128), 50).convert("RGB").save(folder / "noise.png")
    return folder


@pytest.fixture(scope="module")
def runs(train, launch, photo, project):
    """Folders of tiny runs that keep averages, and all their checkpoints.

    Two look at a photo on their way, and two are stopped and go on: one with other processes and another engine.
    """
    looking = (f"eval.images={photo}", "eval.every=2")
    train("averaged_zero0", *SHORT, "engine=zero0")
    train("averaged_zero1", *SHORT, "engine=zero1", *looking)
    train("averaged_zero2", *SHORT, "engine=zero2", "train.stop_after=2")
    train("averaged_zero2", *SHORT, "engine=zero2")
    train("averaged_zero3", *SHORT, "engine=accelerate", *looking, "train.stop_after=1", processes=1)
    train("averaged_zero3", *SHORT, "engine=zero3", *looking)
    # Image 6 spoils a weight in step 2, which the loss of step 3 tells: the averages of step 2 are not finite then.
    diverging = {
        "DIVERGE": json.dumps({"kind": "weight", "image": 6}),
        "PYTHONPATH": str(project / "tests" / "training"),
    }
    rollback = ("engine=zero2", "train.on_divergence=rollback")
    train("averaged_rolled_back", *SHORT, *rollback, processes=1, module="diverging_train", **diverging)
    return {run: launch.folder / f"averaged_{run}" for run in RUNS}


def stored(run: Path, step: int, kind: str) -> dict[str, Tensor]:
    """What a checkpoint holds of a kind, flattened tensors by name."""
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in exported(run, WEIGHTS).items()}
    with open_state(sorted((run / "checkpoints" / f"step_{step:08d}").glob("*.safetensors"))) as pieces:
        for name, values in tensors.items():
            pieces(StateShard(kind, name, 0, values))
    return tensors


def exported(run: Path, file: str) -> dict[str, Tensor]:
    """Flattened tensors by name."""
    return {name: tensor.flatten() for name, tensor in load_file(run / file).items()}


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of any two elements, relative for those above 1: fp32 is rounded relatively."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).abs() / theirs[name].abs().clamp(min=1)).max().item() for name in ours)


def averages_of(run: Path, length: float) -> dict[str, Tensor]:
    """The average of the weights in the run's checkpoints, worked out with whole tensors."""
    average = stored(run, 1, "weight")
    for step in range(2, STEPS + 1):
        kept = (1 - 1 / step) ** (exponent(length) + 1)
        for name, weight in stored(run, step, "weight").items():
            average[name].lerp_(weight, 1 - kept)
    return average


def weighted_sum(run: Path, length: float) -> dict[str, Tensor]:
    """The same from the definition: the integral of the profile over each step, times the weights after it."""
    total = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in stored(run, 1, "weight").items()}
    for step in range(1, STEPS + 1):
        power = exponent(length) + 1
        share = (step / STEPS) ** power - ((step - 1) / STEPS) ** power
        for name, weight in stored(run, step, "weight").items():
            total[name].add_(weight, alpha=share)
    return total


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("run", RUNS)
def test_averages_are_those_of_the_weights_to_the_bit(run, length, runs):
    """However they are sharded, in what is exported and in the last checkpoint; after a resume with another engine and
    number of processes, and after a rollback."""
    average = averages_of(runs[run], length)
    assert furthest(exported(runs[run], f"weights_ema_{length}.safetensors"), average) == 0
    assert furthest(stored(runs[run], STEPS, ema_kind(length)), average) == 0
    assert furthest(exported(runs[run], WEIGHTS), stored(runs[run], STEPS, "weight")) == 0
    assert furthest(average, weighted_sum(runs[run], length)) < 4e-7
    assert furthest(average, exported(runs[run], WEIGHTS)) > 1e-5


@pytest.mark.parametrize("file", FILES)
def test_engines_export_the_same(file, shared, runs):
    """Where the optimizer goes through tensors of the same shapes, at stages 1 and 2, to the bit: so neither does the
    look at a photo through the averages, which only one of the two takes, leave a trace, nor the stop that only the
    other one makes. Elsewhere within its rounding, which grows from step to step."""
    tensors = {run: exported(folder, file) for run, folder in runs.items()}
    assert furthest(tensors["zero1"], tensors["zero2"]) == 0
    for run in ("zero1", "zero3"):
        assert furthest(tensors["zero0"], tensors[run]) < 2e-6


@pytest.mark.parametrize("run", ["zero1", "zero3"])
def test_the_journal_tells_the_losses_of_the_averages(run, runs, photo):
    lines = [json.loads(line) for line in (runs[run] / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [2, 3]
    groups = {"eval": WEIGHTS} | {f"eval_ema_{length}": f"weights_ema_{length}.safetensors" for length in LENGTHS}
    for group, file in groups.items():
        model, facts = load_weights(runs[run] / file)
        assert facts.get("ema") == (None if group == "eval" else float(group.removeprefix("eval_ema_")))
        objective = RateDistortionObjective(facts["lmbda"])
        device = torch.device("cpu")
        mean = evaluate(model, ImageSet(photo), multiple=128, objective=objective, device=device).mean()
        reported = {
            key.partition("/")[2]: value for key, value in evaluations[-1].items() if key.startswith(f"{group}/")
        }
        assert reported == pytest.approx(mean, rel=1e-5)
    losses = [evaluations[-1][f"{group}/loss"] for group in groups]
    assert len(set(losses)) == len(losses)


def test_a_step_left_out_changes_no_average():
    engine = AccelerateEngine(OptimizerConfig(), accumulation=1, clip_norm=1.0)
    engine.prepare(nn.Linear(2, 1))
    averages = EMA(engine, LENGTHS)
    weight, average = engine.state_shards()[0].values, averages.state_shards()[0].values
    before = weight.clone()
    assert torch.equal(average, weight)
    weight.add_(1)
    averages.update()
    assert torch.equal(average, weight)  # nothing is known of before the first step
    weight.add_(1)
    averages.update()
    assert (before + 1 < average).all() and (average < weight).all()
    swapped, own = average.clone(), weight.clone()
    with averages.in_place(LENGTHS[0]):
        assert torch.equal(engine.weights()["weight"].flatten(), swapped)
    assert torch.equal(engine.weights()["weight"].flatten(), own) and torch.equal(average, swapped)


@given(length=some_lengths)
def test_an_exponent_has_its_length(length):
    """From the moments of the profile itself: the integrals of τ^γ, τ^(γ + 1) and τ^(γ + 2) over 0 to 1."""
    power = exponent(length)
    mean, square = (power + 1) / (power + 2), (power + 1) / (power + 3)
    assert power > 0
    assert np.sqrt(square - mean**2) == pytest.approx(length, rel=1e-5)


def test_the_papers_exponents():
    """Section 3.1: γ = 16.97 for 5 % and 6.94 for 10 %."""
    assert [exponent(0.05), exponent(0.1)] == pytest.approx([16.97, 6.94], abs=0.005)


profiles = st.lists(st.tuples(some_lengths, st.integers(1, 60)), min_size=1, max_size=8)


@given(kept=profiles, length=some_lengths, more=st.integers(0, 20))
def test_coefficients_leave_what_is_constant_and_tell_their_error(kept, length, more):
    last = max(updates for _, updates in kept) + more
    shares, error = coefficients([Profile(*profile) for profile in kept], Profile(length, last))
    wanted = weights_on_steps(length, last, last)
    made = sum(share * weights_on_steps(*profile, last) for share, profile in zip(shares, kept, strict=True))
    assert shares.sum() == pytest.approx(1, abs=1e-9)
    assert error == pytest.approx(np.linalg.norm(made - wanted) / np.linalg.norm(wanted), rel=1e-6, abs=1e-9)
    nearest = min(np.linalg.norm(weights_on_steps(*profile, last) - wanted) for profile in kept)
    assert np.linalg.norm(made - wanted) <= nearest + 1e-9


def weights_on_steps(length: float, updates: int, steps: int) -> np.ndarray:
    """How an average weighs the weights after each step, from how it is updated."""
    weights = np.zeros(steps)
    for step in range(1, updates + 1):
        kept = (1 - 1 / step) ** (exponent(length) + 1)
        weights *= kept
        weights[step - 1] = 1 - kept
    return weights


@pytest.mark.parametrize(("updates", "checkpoints", "error"), [(100, 100, 1e-12), (2_000_000, 40, 1e-3), (99, 4, 0.05)])
def test_two_lengths_give_the_ones_between(updates, checkpoints, error):
    times = [updates * (number + 1) // checkpoints for number in range(checkpoints)]
    kept = [Profile(length, time) for length in (0.05, 0.1) for time in times]
    for length in (0.05, 0.06, 0.08, 0.1):
        assert coefficients(kept, Profile(length, updates))[1] < error
    assert coefficients(kept[-1:], Profile(0.2, updates))[1] > MAX_ERROR


def average(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["hpcm ema", *map(str, arguments)])
    average_command()


@pytest.mark.parametrize("length", [0.17, 0.1, 0.28])
def test_an_average_of_another_length(length, runs, monkeypatch, capsys, tmp_path):
    """Three checkpoints of two lengths span all there is to know of three steps."""
    average(monkeypatch, runs["zero1"], "--length", length, "--out", tmp_path / "average.safetensors")
    assert f"EMA of length {length:g} at step 3, from lengths 0.1 and 0.25 in 3 checkpoints" in capsys.readouterr().out
    assert furthest(exported(tmp_path, "average.safetensors"), weighted_sum(runs["zero1"], length)) < 1e-6
    facts, usual = (read_weights_file(path).facts for path in (tmp_path / "average.safetensors", runs["zero1"]))
    made = facts.pop("ema_from")
    assert facts == usual | {"ema": length}
    assert made["lengths"] == list(LENGTHS) and made["steps"] == [1, 2, 3] and made["error"] < 1e-9


def test_an_average_up_to_a_step_over_trunk_and_branch(runs, monkeypatch, tmp_path):
    """The same checkpoints, lying in two folders; one of them is damaged."""
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    shutil.copytree(runs["zero0"], trunk)
    (branch / "checkpoints").mkdir(parents=True)
    (trunk / "checkpoints" / "step_00000003").rename(branch / "checkpoints" / "step_00000003")
    shutil.copytree(
        trunk / "checkpoints" / "step_00000002", trunk / "checkpoints" / "step_00000003"
    )  # after the branch
    config = from_yaml(trunk / "config.yaml")
    (branch / "config.yaml").write_text(to_yaml(replace(config, run=RunConfig(cooldown_of=str(trunk), cooldown_at=2))))
    average(monkeypatch, branch, "--length", 0.2)
    together = exported(branch, "weights_ema_0.2_at_3.safetensors")
    assert furthest(together, weighted_sum(runs["zero0"], 0.2)) < 1e-6
    (trunk / "checkpoints" / "step_00000001" / "rank_00001.safetensors").unlink()
    average(monkeypatch, branch, "--length", 0.2, "--at", 3)
    facts = read_weights_file(branch / "weights_ema_0.2_at_3.safetensors").facts
    assert facts["step"] == 3 and facts["images"] == 12 and facts["ema_from"]["steps"] == [2, 3]


@pytest.mark.parametrize(
    ("length", "more", "reported"),
    [
        (0.29, (), "--length: 0.29 must be at least 0.001 and less than 0.2886751346"),
        (0.0, (), "--length: 0.0 must be at least 0.001"),
        (0.2, ("--at", 7), "has no checkpoint of step 7; choose one of: 1, 2, 3"),
        (0.01, ("--at", 1, "--out", "."), "--out . is a folder"),
    ],
)
def test_what_cannot_be_averaged_is_told_in_one_sentence(length, more, reported, runs, monkeypatch, capsys):
    refused(monkeypatch, capsys, reported, runs["zero0"], "--length", length, *more)


def test_too_few_checkpoints_and_none_are_told(runs, monkeypatch, capsys, tmp_path):
    run = tmp_path / "run"
    refused(monkeypatch, capsys, "is not a run", run, "--length", 0.1)
    shutil.copytree(runs["zero0"], run)
    for step in (1, 2):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    keeps(run, [0.25])
    refused(
        monkeypatch,
        capsys,
        "of length 0.25 in 1 checkpoint approximate",
        run,
        "--length",
        0.05,
    )
    shutil.rmtree(run / "checkpoints")
    refused(monkeypatch, capsys, "has no checkpoint after step 0 yet", run, "--length", 0.1)
    (run / "config.yaml").write_text(
        to_yaml(
            replace(from_yaml(run / "config.yaml"), run=RunConfig(cooldown_of=str(tmp_path / "gone"), cooldown_at=1))
        )
    )
    refused(monkeypatch, capsys, "started its cooldown, is missing", run, "--length", 0.1)
    keeps(run, [])
    refused(monkeypatch, capsys, "has no EMAs of its weights", run, "--length", 0.1)
    assert not list(run.glob("*_at_*"))


def keeps(run: Path, lengths: list[float]) -> None:
    """Have a run's configuration say that it keeps these."""
    config = from_yaml(run / "config.yaml")
    config.train.ema = lengths
    (run / "config.yaml").write_text(to_yaml(config))


def refused(monkeypatch, capsys, reported: str, *arguments: object) -> None:
    with pytest.raises(SystemExit) as end:
        average(monkeypatch, *arguments)
    captured = capsys.readouterr()
    assert end.value.code == 2 and reported in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize("lengths", ["0.0", "-0.1", "0.2887", "0.05,0.05", "nan"])
def test_lengths_that_cannot_be_are_refused(lengths):
    with pytest.raises(
        UserError,
        match=r"^train\.ema=.* (must be at least 0\.001 and less than 0\.2886751346, each|lists a length twice; .*)$",
    ):
        check(compose(["model=nano", f"train.ema=[{lengths}]"]), 1)


def test_long_trainings_take_in_every_few_steps_and_leave_out_none():
    """What each step that is taken in goes on from is the one that was before it: shares stay those of the profile."""
    last, taken = 0, 0
    for updates in range(1, 9 * FINEST):
        before = previous_update(updates)
        if before is not None:
            assert before == last
            assert updates - before <= max(1, updates // FINEST)
            last, taken = updates, taken + 1
    assert taken < 4.2 * FINEST


def test_an_average_moves_late_in_a_long_training():
    """As much as it does in float64; of every single step fp32 would lose a tenth of it."""
    drift, start, steps = 1e-7, 1_900_000, 30_000
    power = exponent(LENGTHS[0]) + 1
    exact, average = torch.ones((), dtype=torch.float64), torch.ones(())
    for updates in range(start, start + steps):
        weight = 1.001 + drift * (updates - start)
        exact.lerp_(torch.tensor(weight, dtype=torch.float64), 1 - (1 - 1 / updates) ** power)
        before = previous_update(updates)
        if before is not None:
            average.lerp_(torch.tensor(weight), 1 - (before / updates) ** power)
    assert average.item() - 1 == pytest.approx(exact.item() - 1, rel=0.01)
