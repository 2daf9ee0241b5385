"""What a run survives: kills at any moment, other numbers of processes and engines, damaged checkpoints, full disks.

The long version of this is `benchmarks/faults.py`.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import threading
from dataclasses import replace

import pytest
from fault_campaign.injections import flip_byte, full, small_disk
from fault_campaign.kills import KillCampaign, Shape
from fault_campaign.runs import Run, ended_with, key, kill, numbers, same_weights, wait_for
from small_training import FEW_BLOCKS, SMALL

from hpcm_scale.errors import STOPPED

pytestmark = pytest.mark.launch

SHAPE = Shape(steps=12, evaluate_every=4, checkpoint_every=2)


@pytest.fixture(scope="module")
def keys(shards, two_images) -> list[str]:
    """Of every run here; the images of a step divide by 1, 2 and 3, and all its blocks take time to be stopped in."""
    network = [key for key in SMALL if key not in FEW_BLOCKS]
    common = [*network, "schedule.learning_rate=1e-4", f"data.shards={shards}", f"eval.images={two_images}"]
    return [*common, "train.batch_size=6", "train.keep_checkpoints=4", "data.workers=1"]


@pytest.fixture(scope="module")
def campaign(keys, fork_server, tmp_path_factory) -> KillCampaign:
    return KillCampaign(tmp_path_factory.mktemp("faults"), keys, ["zero2"], SHAPE, random.Random(1), fork_server)


@pytest.fixture(scope="module")
def unbroken(campaign) -> Run:
    return campaign.reference("zero2")


@pytest.mark.parametrize(
    ("kills", "faults"),
    [(2, {"one rank"}), pytest.param(4, {"one rank", "the launcher", "all"}, marks=pytest.mark.long)],
)
def test_kill_9_at_random_moments_loses_and_repeats_nothing(kills, faults, campaign, tmp_path):
    """In a step, and during the export; longer, also of the launcher, and of all at once."""
    campaign = replace(campaign, folder=tmp_path, random=random.Random(1), kills=[], endings=[])
    campaign.inject(kills, runs=1)
    assert [kill for kill in campaign.kills if not kill.survived] == []
    assert len(campaign.kills) == kills and {kill.fault for kill in campaign.kills} == faults
    assert all(ending.same_journal and ending.same_weights for ending in campaign.endings)


def test_the_exit_code_of_a_launch_that_is_gone_is_known(keys, fork_server, tmp_path):
    """Whoever started it learns of its end a second after its processes are gone."""
    run = Run(tmp_path / "run", [*keys, *SHAPE.overrides(), "engine=zero2"])
    with ended_with(run):
        run.start(fork_server)
        wait_for(lambda: len(run.ranks()) == 2, 400, "the ranks")
        os.kill(fork_server.pid, signal.SIGSTOP)
        goes_on = threading.Timer(1.0, os.kill, (fork_server.pid, signal.SIGCONT))
        goes_on.start()
        kill(run.members())
        run.wait_until_gone()
        assert run.poll() == -signal.SIGKILL
        goes_on.join()


def test_stopped_in_every_way_and_gone_on_with_other_engines(unbroken, keys, fork_server, tmp_path):
    """The same command but for the numbers; each way to stop ends it with the exit code that asks for another start."""

    def started(engine: str, processes: int, *changes: str) -> Run:
        run = Run(tmp_path / "run", [*keys, *SHAPE.overrides(), f"engine={engine}", *changes], processes)
        run.start(fork_server)
        return run

    def code(run: Run) -> int:
        wait_for(lambda: run.poll() is not None, 400, "the end")
        run.wait_until_gone()
        return run.poll()

    def stepped(run: Run, step: int) -> None:
        wait_for(lambda: run.step() >= step or run.poll() is not None, 400, f"step {step}")

    with ended_with(started("zero2", 2)) as run:
        stepped(run, 1)
        (run.folder / "stop").touch()
        assert code(run) == STOPPED, run.output()
        assert "stopped on request" in run.output() and not (run.folder / "stop").exists()
    with ended_with(started("accelerate", 1)) as run:
        stepped(run, run.newest() + 1)
        os.kill(run.ranks()[0].pid, signal.SIGUSR1)
        assert code(run) == STOPPED and "SIGUSR1" in run.output(), run.output()
    with ended_with(started("zero3", 3, "train.max_hours=1e-6")) as run:
        assert code(run) == STOPPED and "train.max_hours" in run.output(), run.output()
    with ended_with(started("zero1", 2)) as run:
        assert code(run) == 0, run.output()
    found, expected = run.records(), unbroken.records()
    exact = ("train/images", "train/learning_rate", "compute/pflops")
    for ours, theirs in zip(found, expected, strict=True):
        assert key(ours) == key(theirs)
        assert all(ours.get(name) == theirs.get(name) for name in exact)
        for name in ("train/loss", "train/grad_norm", "eval/loss"):
            assert ours.get(name) == (theirs.get(name) and pytest.approx(theirs[name], rel=1e-5))


def test_damaged_checkpoints_are_named_and_the_one_before_is_taken(unbroken, keys, fork_server, tmp_path):
    """The newest has a flipped byte, the next is cut short, of the third a file is missing."""
    shutil.copytree(unbroken.folder, tmp_path / "run")
    run = Run(tmp_path / "run", [*keys, *SHAPE.overrides(), "engine=zero2"])
    run.weights.unlink()
    kept, missing, cut, flipped = (sorted(path.glob("*.safetensors")) for path in sorted(run.checkpoints.iterdir()))
    flip_byte(flipped[1], random.Random(0))
    os.truncate(cut[0], cut[0].stat().st_size // 2)
    missing[1].unlink()
    with ended_with(run):
        assert run.finish(fork_server) == 0, run.output()
    named = [line for line in run.output().splitlines() if line.startswith("skipped: ")]
    for line, path in zip(named, (flipped[1], cut[0], missing[1]), strict=True):
        assert path.parent.name in line and path.name in line
    assert f"resuming from step {int(kept[0].parent.name[-8:])} " in run.output()
    assert numbers(run.records()) == numbers(unbroken.records())
    assert same_weights(run.weights, unbroken.weights)


def test_on_a_full_disk_training_goes_on(keys, fork_server, tmp_path):
    """Loudly, with the earlier checkpoints as they were; once there is room again, all is written."""
    with small_disk(tmp_path / "disk", megabytes=64) as disk:
        if disk is None:
            pytest.skip("needs root, to mount a small file system")
        changes = ["train.steps=1000", "train.checkpoint_every=3", "eval.every=1000", "train.micro_batch_size=1"]
        run = Run(disk / "run", [*keys, *changes, "train.batch_size=2", "engine=accelerate"], 1, tmp_path / "log")
        with ended_with(run):
            run.start(fork_server)
            wait_for(lambda: run.newest() >= 6 or run.poll() is not None, 400, "a checkpoint")
            with full(disk):
                before, step = hashes(run), run.step()
                wait_for(lambda: failures(run) >= 2 or run.poll() is not None, 400, "words")
                assert hashes(run) == before
            failed = run.newest()
            wait_for(lambda: run.newest() > failed or run.poll() is not None, 400, "a checkpoint")
            assert run.poll() is None, run.output()
            (run.folder / "stop").touch()
            wait_for(lambda: run.poll() is not None, 400, "the end")
            assert run.poll() == STOPPED
        assert [record["step"] for record in run.records()] == list(range(1, run.newest() + 1))
        assert run.newest() > step


def failures(run: Run) -> int:
    """Checkpoints that it has said could not be written."""
    return run.output().count("could not be written")


def hashes(run: Run) -> dict[str, str]:
    """Of all files of the complete checkpoints."""
    folders = [marker.parent for marker in run.checkpoints.glob("step_*/complete.json")]
    files = [path for folder in folders for path in folder.iterdir()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
