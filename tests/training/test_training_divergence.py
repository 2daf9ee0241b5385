"""Losses, gradients and weights that are not finite, and losses that leap: skipped, rolled back, or the end."""

from __future__ import annotations

import json
import math
import random

import pytest
from fault_campaign.injections import flip_byte
from small_training import SMALL

from hpcm_scale.training.divergence import MIN_LOSSES, WINDOW, Divergence, LossHistory, images_to_skip

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def diverge(launch, shards, project):
    """`diverge(run, kind, *overrides, …)`: a `SMALL` training of two processes with a fault in image `image`."""

    def start(run: str, kind: str, *overrides: str, image: int = 18, processes: int = 2):
        return launch(
            *SMALL,
            f"data.shards={shards}",
            f"run.dir={run}",
            "train.checkpoint_every=2",
            *overrides,
            processes=processes,
            module="diverging_train",
            DIVERGE=json.dumps({"kind": kind, "image": image}),
            PYTHONPATH=str(project / "tests" / "training"),
        )

    return start


def journal(launch, run: str) -> list[dict]:
    return [json.loads(line) for line in (launch.folder / run / "metrics.jsonl").read_text().splitlines()]


def test_a_bad_step_is_skipped_by_all(diverge, launch):
    """Image 18 is in step 5; test_training_nonfinite.py has every engine."""
    result = diverge("skip", "gradient", "engine=zero0", "train.steps=7")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "step 5 skipped: its gradient is not finite" in result.stdout
    lines = journal(launch, "skip")
    assert [line["train/skipped"] for line in lines] == [0, 0, 0, 0, 1, 0, 0]
    assert lines[4]["train/loss"] is None and all(line["train/loss"] for line in lines[5:])


def test_harm_that_shows_a_step_later_is_found(diverge, launch):
    """A photo that spoils the weights in step 5 is found out in step 6: the second rollback leaves out both steps."""
    result = diverge("corrupt", "weight", "engine=zero2", "train.on_divergence=rollback", "train.steps=8")
    assert result.returncode == 0, result.stdout + result.stderr
    sentence = "step 6: its loss is not finite: rolled back to step 4, continuing without the images 20 to 23"
    assert sentence in result.stdout
    noted = json.loads((launch.folder / "corrupt" / "divergences.json").read_text())
    assert [(entry["step"], entry["first"], entry["last"]) for entry in noted] == [(6, 20, 23), (6, 16, 23)]
    lines = journal(launch, "corrupt")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["train/rollbacks"] for line in lines] == [0] * 4 + [2] * 4
    assert all(math.isfinite(line["train/loss"]) for line in lines)


def test_rollbacks_have_a_limit(diverge):
    limit = ("train.on_divergence=rollback", "train.steps=3", "train.max_rollbacks=0")
    result = diverge("rollback_limit", "loss", *limit, image=1, processes=1)
    assert result.returncode == 2
    assert "step 1: its loss is not finite, after train.max_rollbacks=0 rollbacks" in result.stderr


def test_a_rollback_from_a_damaged_checkpoint(diverge, launch):
    """The checkpoint of step 4 is damaged: step 4, done again, diverges (image 13), and is taken back to step 2."""
    command = ("rollback_damaged", "loss", "train.on_divergence=rollback", "train.steps=6")
    result = diverge(*command, "train.stop_after=4", processes=1, image=10**6)
    assert result.returncode == 0, result.stdout + result.stderr
    checkpoints = launch.folder / "rollback_damaged" / "checkpoints"
    [weights] = (checkpoints / "step_00000004").glob("*.safetensors")
    flip_byte(weights, random.Random(0))
    result = diverge(*command, "train.checkpoint_every=1", processes=1, image=13)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        "step 4: its loss is not finite: rolled back to step 3, continuing without the images 12 to 15" in result.stdout
    )
    assert [line["train/rollbacks"] for line in journal(launch, "rollback_damaged")] == [0, 0, 0, 1, 1, 1]


def test_which_images_are_left_out():
    before: list[Divergence] = []
    for expected in ((9, 9), (8, 9), (6, 9), (4, 9), (4, 9)):
        first, last = images_to_skip(step=10, checkpoint=4, before=before, images_at=lambda step: step)
        assert (first, last) == expected
        before.append(Divergence(10, "", first, last))
    assert images_to_skip(step=13, checkpoint=12, before=before, images_at=lambda step: 4 * step) == (48, 51)


def test_stop_ends_the_run_in_one_sentence(diverge, launch):
    """The checkpoint of step 4, which is still being written, counts."""
    result = diverge("stopped", "loss", "train.on_divergence=stop", "train.steps=8", "train.checkpoint_every=4")
    assert result.returncode == 2
    said = [line for line in result.stderr.splitlines() if line.startswith("hpcm: ")]
    assert len(said) == 1 and "the run stopped at step 5: its loss is not finite" in said[0]
    assert [path.parent.name for path in (launch.folder / "stopped").glob("checkpoints/*/complete.json")] == [
        "step_00000004"
    ]


def test_a_leaping_loss_is_skipped(diverge, launch):
    """Image 89 is in step 23; twenty losses make a history."""
    result = diverge("spike", "spike", "train.steps=24", "train.checkpoint_every=50", image=89, processes=1)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "step 23 skipped: its loss of " in result.stdout and "times the usual" in result.stdout
    assert [line["step"] for line in journal(launch, "spike") if line["train/skipped"]] == [23]


def test_the_verdict_on_a_loss():
    history = LossHistory([1.0] * (MIN_LOSSES - 1))
    assert history.verdict(math.nan, None) == history.verdict(-math.inf, 10.0) == "its loss is not finite"
    assert history.verdict(1e6, 10.0) == ""  # too early to tell
    history.add(1.0)
    assert "1e+06 times the usual 1" in history.verdict(1e6, 10.0)
    assert history.verdict(9.9, 10.0) == history.verdict(1e6, None) == ""
    for _ in range(2 * WINDOW):
        history.add(5.0)
    assert len(history.losses) == WINDOW and history.verdict(49.0, 10.0) == ""
