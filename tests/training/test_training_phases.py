"""Crops that grow while a run trains: nothing of it shows where the run was stopped, or by whom it is trained."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from hpcm_scale.compute.tracker import ComputeTracker
from hpcm_scale.config.compose import compose
from hpcm_scale.config.phases import crop_starts, images_at, phases
from hpcm_scale.config.schema import Config
from hpcm_scale.data.mixture import load_mixture, sample_at
from hpcm_scale.errors import UserError
from hpcm_scale.training.cooldown import branch
from hpcm_scale.training.costs import task_costs
from hpcm_scale.training.divergence import Divergence, culprits
from hpcm_scale.training.run_folder import RunFolder
from hpcm_scale.training.task import batches

SIZES = ("model.fusion=none", "data.crop=128", "train.batch_size=16", "train.micro_batch_size=4")
GROWING = (*SIZES, "schedule.crops=[256]", "schedule.crop_boundaries=[0.5]", "train.steps=4")
"""Steps of 16 crops of 128², from step 2 on of 4 of 256²: on two processes in two rounds of 4, then of 1."""


def composed(*overrides: str) -> Config:
    return compose(["model=nano", *GROWING, *overrides])


def told(records: list[dict]) -> list[dict]:
    """What does not depend on the clock."""
    return [
        {key: value for key, value in record.items() if not key.startswith(("perf/", "time"))} for record in records
    ]


def weights(launch, run: str) -> dict[str, torch.Tensor]:
    return load_file(launch.folder / run / "weights.safetensors")


@pytest.mark.launch
@pytest.mark.parametrize(
    ("engine", "processes", "batch", "stop"),
    [("zero2", 2, 16, 3), ("accelerate", 1, 8, 1)],
    ids=["zero2", "accelerate"],
)
def test_a_stopped_run_is_the_unbroken_one(engine, processes, batch, stop, train, launch):
    """Stopped before its crops grow, or afterwards; in two rounds per step."""
    later = batch // 4
    overrides = (*GROWING, f"train.batch_size={batch}", f"engine={engine}", "log.wandb=disabled", "data.workers=1")
    unbroken = train(f"growing_{engine}", *overrides, processes=processes)
    assert f"4 steps of {batch} crops of 128² ({later} of 256² from step 2 on)" in train.output
    assert train.output.count(f"step 2: from here on {later} crops of 256²") == 1
    train(f"stopped_{engine}", *overrides, f"train.stop_after={stop}", processes=processes)
    resumed = train(f"stopped_{engine}", *overrides, processes=processes)
    assert f"going on from step {stop}" in train.output
    assert told(resumed) == told(unbroken)
    images = [batch, 2 * batch, 2 * batch + later, 2 * batch + 2 * later]
    assert [record["train/images"] for record in resumed] == images
    small, large = (task_costs(composed(), crop=crop).training_flops_per_image for crop in (128, 256))
    flops = [batch * small, 2 * batch * small, 2 * batch * small + later * large, 2 * (batch * small + later * large)]
    assert [record["compute/pflops"] for record in resumed] == [count / 1e15 for count in flops]
    whole, broken = weights(launch, f"growing_{engine}"), weights(launch, f"stopped_{engine}")
    assert whole.keys() == broken.keys() and all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.parametrize("world_size", [1, 2])
def test_images_follow_each_other_through_the_phases(world_size, shards):
    """Wherever a run is taken up: the same photos as one that never stopped, in crops of their phase."""
    config = composed(f"data.shards={shards}", "data.workers=0")
    index = load_mixture(config.data)
    [photos] = index.indices
    left_out = [range(30, 34)]  # on both sides of the boundary
    for step in range(5):
        parts = {"world_size": world_size, "index": index, "left_out": left_out}
        streams = [batches(config, step, rank=rank, **parts) for rank in range(world_size)]
        for now in range(step, 4):
            count, crop = (4, 128) if now < 2 else (1, 256)
            image, sizes = images_at(config, now), []
            for _ in range(4 // world_size):
                for stream in streams:
                    batch = next(stream)
                    assert batch.image_index.tolist() == list(range(image, image + count))
                    turns = [place + len(photos) * (place in left_out[0]) for place in range(image, image + count)]
                    assert batch.keys == [photos.keys[sample_at(0, turn, len(photos))] for turn in turns]
                    image, sizes = image + count, [*sizes, tuple(batch.images.shape)]
            assert set(sizes) == {(count, 3, crop, crop)} and image == images_at(config, now + 1)
        for stream in streams:
            stream.close()


def test_a_divergence_leaves_out_the_images_of_its_steps():
    images = partial(images_at, composed())
    before = [Divergence(4, "", 0, 0)] * 2
    spans = [culprits(4, checkpoint=1, before=before[:again], images_at=images) for again in range(3)]
    assert spans == [(36, 39), (32, 39), (16, 39)]


def test_flops_are_those_of_each_images_crop():
    tracker = ComputeTracker({0: 3, 48: 13, 60: 1000}, torch.device("cpu"), peak=1.0)
    totals = []
    for images in (16, 32, 4, 8, 1):
        tracker.step(images, waited=0.0)
        totals.append(round(tracker.pflops * 1e15))
    assert totals == [48, 48 * 3, 48 * 3 + 4 * 13, 48 * 3 + 12 * 13, 48 * 3 + 12 * 13 + 1000]
    seconds = tracker.seconds
    assert tracker.rates()["perf/mfu"] == pytest.approx(totals[-1] / seconds)
    tracker.step(2, waited=0.0)
    assert tracker.rates()["perf/mfu"] == pytest.approx(2000 / (tracker.seconds - seconds))


def checkpointed(path, step: int, *overrides: str) -> RunFolder:
    """A run folder with one checkpoint, that holds no weights."""
    folder, config = RunFolder(path), composed("train.steps=100", *overrides)
    folder.write_facts(config)
    made = folder.checkpoints.of(step)
    made.folder.mkdir(parents=True)
    made.complete({}, {"step": step, "data": "digest", "tracker": {"images": images_at(config, step)}})
    return folder


def test_a_boundary_that_has_been_passed_stays(tmp_path):
    """More steps move a fraction: before it is passed that is as for the learning rate, afterwards it is refused."""
    passed, ahead = checkpointed(tmp_path / "passed", 60), checkpointed(tmp_path / "ahead", 40)
    longer = composed("train.steps=200")
    assert ahead.resume(longer, "digest").step == 40
    with pytest.raises(UserError) as refused:
        passed.resume(longer, "digest")
    text = str(refused.value)
    assert "has trained on 840 images in 60 steps, and" in text and "it would have been 960" in text
    assert "give schedule.crop_boundaries=[50], in steps," in text and "\n" not in text
    assert passed.resume(composed("train.steps=200", "schedule.crop_boundaries=[50]"), "digest").step == 60
    with pytest.raises(UserError, match=r"schedule\.crops=.*256"):
        passed.resume(composed("train.steps=100", "schedule.crops=[384]"), "digest")


@pytest.mark.parametrize(("at", "boundary"), [(40, 0.5), (80, 0.5), (80, 50.0), (96, 0.07)])
def test_a_branch_keeps_its_trunks_crops(at, boundary, tmp_path):
    folder = checkpointed(tmp_path / "trunk", at, f"schedule.crop_boundaries=[{boundary}]")
    config = branch(folder.path, at, 0.2)
    trunk = composed("train.steps=100", f"schedule.crop_boundaries=[{boundary}]")
    assert config.train.steps == at * 5 // 4 and crop_starts(config) == crop_starts(trunk)
    assert [images_at(config, step) for step in range(at + 1)] == [images_at(trunk, step) for step in range(at + 1)]
    assert RunFolder(config.run.dir).resume(config, "digest").step == at


def test_a_branch_may_grow_its_crops_but_not_in_the_past(tmp_path):
    folder = checkpointed(tmp_path / "trunk", 40, "schedule.crops=[]", "schedule.crop_boundaries=[]")
    config = branch(folder.path, 40, 0.2, ["schedule.crops=[256]", "schedule.crop_boundaries=[40]"])
    assert [phase.first_image for phase in phases(config)] == [0, 640]
    assert RunFolder(config.run.dir).resume(config, "digest").step == 40
    config = branch(folder.path, 40, 0.2, ["schedule.crops=[256]", "schedule.crop_boundaries=[39]"])
    with pytest.raises(UserError, match=r"has trained on 640 images in 40 steps, and .* it would have been 628"):
        RunFolder(config.run.dir).resume(config, "digest")
