"""Crops that grow while a run trains: nothing of it shows where the run was stopped, or by whom it is trained."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from small_training import SMALL

from hpcm_scale.compute.tracker import ComputeTracker
from hpcm_scale.config.compose import compose, to_yaml
from hpcm_scale.config.schema import Config
from hpcm_scale.config.spec import RunSpec, crop_starts
from hpcm_scale.data.mixture import load_mixture, sample_at
from hpcm_scale.errors import UserError
from hpcm_scale.training.cooldown import cooldown
from hpcm_scale.training.costs import task_costs
from hpcm_scale.training.divergence import Divergence, images_to_skip
from hpcm_scale.training.run_folder import RunFolder
from hpcm_scale.training.start import Resume, find_resume
from hpcm_scale.training.task import batches

SIZES = ("model.fusion=none", "data.crop=128", "train.batch_size=16", "train.micro_batch_size=4")
GROWING = (*SIZES, "schedule.crops=[256]", "schedule.crop_boundaries=[0.5]", "train.steps=4")
"""Steps of 16 crops of 128², from step 2 on of 4 of 256²: on two processes in two rounds of 4, then of 1."""


def composed(*overrides: str) -> Config:
    return compose([*SMALL, *GROWING, *overrides])


def reported(records: list[dict]) -> list[dict]:
    """What does not depend on the clock."""
    return [
        {key: value for key, value in record.items() if not key.startswith(("perf/", "time"))} for record in records
    ]


def weights(launch, run: str) -> dict[str, torch.Tensor]:
    return load_file(launch.folder / run / "weights.safetensors")


@pytest.mark.launch
def test_a_stopped_run_is_the_unbroken_one(train, launch):
    """Stopped before its crops grow, and afterwards; in two rounds per step."""
    overrides = (*GROWING, "engine=zero2", "data.workers=1")
    unbroken = train("growing", *overrides)
    assert "4 steps of 16 crops of 128² (4 of 256² from step 2 on)" in train.output
    assert train.output.count("step 2: 4 crops of 256² from this step on") == 1
    for stop in (1, 3):
        train("growing_stopped", *overrides, f"train.stop_after={stop}")
    resumed = train("growing_stopped", *overrides)
    assert "resuming from step 3" in train.output
    assert reported(resumed) == reported(unbroken)
    assert [record["train/images"] for record in resumed] == [16, 32, 36, 40]
    config = composed()
    small, large = (task_costs(config.model, config.machine, crop).training_flops_per_image for crop in (128, 256))
    flops = [16 * small, 32 * small, 32 * small + 4 * large, 32 * small + 8 * large]
    assert [record["compute/pflops"] for record in resumed] == [count / 1e15 for count in flops]
    whole, broken = weights(launch, "growing"), weights(launch, "growing_stopped")
    assert whole.keys() == broken.keys() and all(torch.equal(whole[name], broken[name]) for name in whole)


@pytest.mark.parametrize("world_size", [1, 2])
def test_images_follow_each_other_through_the_phases(world_size, shards):
    """Wherever a run is taken up: the same photos as one that never stopped, in crops of their phase."""
    config = composed(f"data.shards={shards}", "data.workers=0")
    index, spec = load_mixture(config.data), RunSpec.of(config, world_size)
    [photos] = index.indices
    left_out = [range(30, 34)]  # on both sides of the boundary
    for step in range(5):
        parts = {"index": index, "left_out": left_out}
        streams = [
            batches(config.data, config.train.seed, spec, step, rank=rank, **parts) for rank in range(world_size)
        ]
        for now in range(step, 4):
            count, crop = (4, 128) if now < 2 else (1, 256)
            image, sizes = spec.images_at(now), []
            for _ in range(4 // world_size):
                for stream in streams:
                    batch = next(stream)
                    assert batch.image_index.tolist() == list(range(image, image + count))
                    turns = [place + len(photos) * (place in left_out[0]) for place in range(image, image + count)]
                    assert batch.keys == [photos.keys[sample_at(0, turn, len(photos))] for turn in turns]
                    image, sizes = image + count, [*sizes, tuple(batch.images.shape)]
            assert set(sizes) == {(count, 3, crop, crop)} and image == spec.images_at(now + 1)
        for stream in streams:
            stream.close()


def test_a_divergence_leaves_out_the_images_of_its_steps():
    images = RunSpec.of(composed(), 1).images_at
    before = [Divergence(4, "", 0, 0)] * 2
    spans = [images_to_skip(4, checkpoint=1, before=before[:again], images_at=images) for again in range(3)]
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
    folder.record_start(to_yaml(config))
    made = folder.checkpoints.of(step)
    made.folder.mkdir(parents=True)
    made.complete({}, {"step": step, "data": "digest", "tracker": {"images": RunSpec.of(config, 1).images_at(step)}})
    return folder


def resumed(folder: RunFolder, config: Config) -> Resume:
    return find_resume(folder, config, RunSpec.of(config, 1), "digest")


def test_a_boundary_that_has_been_passed_stays(tmp_path):
    """More steps move a fraction: before it is passed that is as for the learning rate, afterwards it is refused."""
    passed, ahead = checkpointed(tmp_path / "passed", 60), checkpointed(tmp_path / "ahead", 40)
    longer = composed("train.steps=200")
    assert resumed(ahead, longer).step == 40
    with pytest.raises(UserError) as refused:
        resumed(passed, longer)
    assert refused.value.code == "other-crop-schedule" and "set schedule.crop_boundaries=[50]" in str(refused.value)
    assert "840" in str(refused.value) and "960" in str(refused.value)
    assert resumed(passed, composed("train.steps=200", "schedule.crop_boundaries=[50]")).step == 60
    with pytest.raises(UserError, match=r"schedule\.crops=.*256"):
        resumed(passed, composed("train.steps=100", "schedule.crops=[384]"))


@pytest.mark.parametrize(("at", "boundary"), [(40, 0.5), (80, 0.5), (80, 50.0), (96, 0.07)])
def test_a_branch_keeps_its_trunks_crops(at, boundary, tmp_path):
    folder = checkpointed(tmp_path / "trunk", at, f"schedule.crop_boundaries=[{boundary}]")
    config = cooldown(folder.path, at, 0.2)
    trunk = composed("train.steps=100", f"schedule.crop_boundaries=[{boundary}]")
    starts = [crop_starts(each.schedule, each.train.steps) for each in (config, trunk)]
    assert config.train.steps == at * 5 // 4 and starts[0] == starts[1]
    images = [[RunSpec.of(each, 1).images_at(step) for step in range(at + 1)] for each in (config, trunk)]
    assert images[0] == images[1]
    assert resumed(RunFolder(config.run.dir), config).step == at


def test_a_branch_may_grow_its_crops_but_not_in_the_past(tmp_path):
    folder = checkpointed(tmp_path / "trunk", 40, "schedule.crops=[]", "schedule.crop_boundaries=[]")
    config = cooldown(folder.path, 40, 0.2, ["schedule.crops=[256]", "schedule.crop_boundaries=[40]"])
    assert [phase.first_image for phase in RunSpec.of(config, 1).phases] == [0, 640]
    assert resumed(RunFolder(config.run.dir), config).step == 40
    config = cooldown(folder.path, 40, 0.2, ["schedule.crops=[256]", "schedule.crop_boundaries=[39]"])
    with pytest.raises(UserError, match=r"640 .* 628"):
        resumed(RunFolder(config.run.dir), config)
