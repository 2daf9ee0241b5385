"""Checkpoints count only when they are whole, and belong to no engine."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from hpcm_scale.config.schema import OptimizerConfig, TrainConfig
from hpcm_scale.errors import UserError
from hpcm_scale.files import sha256_of
from hpcm_scale.training.checkpoints import Checkpoint, Checkpoints, FailedSave, Saver
from hpcm_scale.training.engines.accelerate import AccelerateEngine
from hpcm_scale.training.state_shards import ALIGNMENT, HostCopy, StateShard, load, partition, write


@pytest.fixture(scope="module")
def engine() -> AccelerateEngine:
    """A real engine with a real, small model: one process, no group."""
    engine = AccelerateEngine(OptimizerConfig(), accumulation=1, clip_norm=1.0)
    torch.manual_seed(0)
    engine.prepare(nn.Linear(4, 4))
    return engine


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def train_step(engine: AccelerateEngine) -> float:
    loss = engine.module(torch.arange(8.0, device=engine.device).view(2, 4)).square().mean()
    engine.backward(loss)
    engine.step(1e-2, float(engine.clip()))
    return loss.item()


def save(engine, checkpoints, *steps: int, before=lambda: None, losses=None, **kept) -> list[FailedSave]:
    train = TrainConfig(**({"keep_checkpoints": 1, "keep_best": False} | kept))
    saver = Saver(engine, checkpoints, train, before=before)
    ended = []
    for step in steps:
        ended += saver.begin({"step": step, "note": "λ", "evaluation": (losses or {}).get(step)})
    ended += saver.finish()
    saver.close()
    return ended


def test_retention_and_manifest(engine, checkpoints):
    assert checkpoints.newest() is None
    (checkpoints.folder / "step_00000005").mkdir(parents=True)  # of a save that never finished
    for step in (10, 20, 30):
        assert save(engine, checkpoints, step, keep_checkpoints=2) == []
        checkpoint, state, damaged = checkpoints.newest()
        assert checkpoint.folder.name == f"step_{step:08d}" and damaged == []
        assert state["step"] == step and state["note"] == "λ"
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step_00000020", "step_00000030"]
    files = sorted(path.name for path in checkpoints.of(30).folder.iterdir())
    assert files == ["complete.json", "rank_00000.safetensors"]
    save(engine, checkpoints, 100_000_000)
    assert checkpoints.steps() == [100_000_000]


def test_what_is_kept_for_good(engine, checkpoints):
    losses = {20: 1.5, 30: 1.0, 40: 2.0}
    save(engine, checkpoints, 10, 20, 30, 40, 45, keep_at=[10, 99], keep_best=True, losses=losses)
    assert checkpoints.steps() == [10, 30, 45]
    assert checkpoints.at(30).state["evaluation"] == 1.0 and checkpoints.at(20) is None
    save(engine, checkpoints, 50, 60, 70, 75, keep_every=50)
    assert checkpoints.steps() == [50, 75]


def test_an_evaluation_that_is_not_finite_is_not_the_best(engine, checkpoints):
    save(engine, checkpoints, 10, 20, 30, keep_best=True, losses={10: math.nan, 20: 1.0, 30: 2.0})
    assert checkpoints.steps() == [20, 30]


def test_later_ones_were_passed_over_and_go(engine, checkpoints):
    """The one of step 30 was damaged, and training went on from that of step 10."""
    save(engine, checkpoints, 10, 30, keep_checkpoints=2)
    flip(checkpoints.of(30).folder / "rank_00000.safetensors")
    save(engine, checkpoints, 20, keep_checkpoints=2)
    assert checkpoints.steps() == [10, 20]


def test_a_copy_that_somebody_made_is_left_alone(engine, checkpoints):
    save(engine, checkpoints, 10)
    copy = shutil.copytree(checkpoints.of(10).folder, checkpoints.folder / "step_00000010.backup")
    save(engine, checkpoints, 20)
    assert checkpoints.steps() == [20] and checkpoints.newest().checkpoint.step == 20
    assert (copy / "complete.json").is_file()


def test_training_goes_on_from_a_checkpoint_bit_for_bit(engine, checkpoints):
    for _ in range(3):
        train_step(engine)
    save(engine, checkpoints, 3)
    losses = [train_step(engine) for _ in range(3)]
    checkpoint, state, _ = checkpoints.newest()
    load([checkpoint.folder / name for name in checkpoint.read()[0]], engine.state_shards())
    engine.load_master_weights(state["updates"])
    assert [train_step(engine) for _ in range(3)] == losses
    assert losses[0] > losses[1] > losses[2]


def test_training_goes_on_while_a_checkpoint_is_written(engine, checkpoints):
    """What is written is what was there when it began, whatever the next steps change."""
    saver = Saver(engine, checkpoints, TrainConfig(keep_checkpoints=1), before=lambda: None)
    weight = engine.state_shards()[0].values.clone()
    saver.begin({"step": 1})
    train_step(engine)
    while saver.flags() == (0.0, 0.0):
        pass
    assert checkpoints.newest() is None  # not before all ranks have committed
    assert saver.commit(*saver.flags()) == []
    assert saver.finish() == []
    saver.close()
    written = load_file(checkpoints.of(1).folder / "rank_00000.safetensors")
    assert torch.equal(written["weight/weight@0"], weight)
    assert not torch.equal(engine.state_shards()[0].values, weight)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ValueError("odd")])
def test_a_save_that_fails_leaves_the_last_one_valid(error, engine, checkpoints):
    save(engine, checkpoints, 10)

    def fails() -> None:
        raise error

    [ended] = save(engine, checkpoints, 20, before=fails)
    assert ended.step == 20 and ended.error in ("No space left on device", "odd")
    assert checkpoints.newest().state["step"] == 10
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_00000010"]
    assert save(engine, checkpoints, 20) == []
    assert checkpoints.steps() == [20]


def test_weights_that_are_not_finite_are_never_saved(checkpoints):
    engine = AccelerateEngine(OptimizerConfig(), accumulation=1, clip_norm=1.0)
    engine.prepare(nn.Linear(4, 4))
    save(engine, checkpoints, 10)
    engine.state_shards()[0].values[3] = torch.nan
    [ended] = save(engine, checkpoints, 20)
    assert ended == FailedSave(20, "weights or moments are not finite")
    assert checkpoints.steps() == [10]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "rank_00000.safetensors is damaged": lambda folder: flip(folder / "rank_00000.safetensors"),
    "rank_00000.safetensors is missing": lambda folder: (folder / "rank_00000.safetensors").unlink(),
    "instead of": lambda folder: os.truncate(folder / "rank_00000.safetensors", 100),
    "complete.json is damaged": lambda folder: flip(folder / "complete.json"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_the_one_before_is_taken(what, engine, checkpoints):
    save(engine, checkpoints, 10, 20, keep_checkpoints=2)
    DAMAGE[what](checkpoints.of(20).folder)

    def examine(checkpoint: Checkpoint) -> str:
        return checkpoint.flaw(hashes=True)

    checkpoint, state, [damaged] = checkpoints.newest(examine)
    assert checkpoint.step == state["step"] == 10
    assert "step_00000020" in damaged and what in damaged
    with pytest.raises(UserError, match="step_00000020 cannot be used"):
        checkpoints.at(20, examine)
    DAMAGE[what](checkpoints.of(10).folder)
    with pytest.raises(UserError, match=r"every checkpoint is damaged .*step_00000020.*step_00000010"):
        checkpoints.newest(examine)


def test_every_process_looks_at_its_share_of_the_hashes(tmp_path):
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_bytes(name.encode() * 9)
    checkpoint = Checkpoint(folder)
    checkpoint.complete({name: (9, sha256_of(folder / name)) for name in "abc"}, {"step": 1})
    flip(folder / "b")
    flaws = [checkpoint.flaw(hashes=True, rank=rank, world_size=2) for rank in range(2)]
    assert flaws == ["", "b is damaged"]


def test_a_checkpoint_of_another_format_is_no_checkpoint(checkpoints):
    folder = checkpoints.of(7).folder
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text(json.dumps({"step": 7}))
    with pytest.raises(UserError, match=r"complete\.json is damaged"):
        checkpoints.newest()


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    writers=st.integers(1, 5),
    readers=st.integers(1, 5),
)
def test_shards_of_any_number_of_processes_are_read_by_any_other(sizes, writers, readers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    whole = [StateShard("weight", f"layer.{i}", 0, torch.randn(size)) for i, size in enumerate(sizes)]
    files = []
    for rank in range(writers):
        part = partition(whole, rank, writers)
        files.append(folder / f"{rank}.safetensors")
        write(files[-1], {shard.key: shard.values.clone() for shard in part})
    blank = [shard._replace(values=torch.full_like(shard.values, torch.nan)) for shard in whole]
    for rank in range(readers):
        load(files, partition(blank, rank, readers))
    for written, read in zip(whole, blank, strict=True):
        assert torch.equal(written.values, read.values)


def test_missing_values_are_reported(tmp_path):
    write(tmp_path / "a", {"weight/x@0": torch.ones(3)})
    with pytest.raises(ValueError, match="weight/x@0 lacks 1 of its values"):
        load([tmp_path / "a"], [StateShard("weight", "x", 0, torch.zeros(4))])
    with pytest.raises(ValueError, match="weight/y@0 lacks 2 of its values"):
        load([tmp_path / "a"], [StateShard("weight", "y", 0, torch.zeros(2))])


def test_a_copy_takes_the_room_of_its_pieces_and_no_more():
    """torch's pinned memory would come in powers of two: here 5 times of 1 MiB, for little more than 2.5."""
    state = [
        StateShard("weight", f"w{size}", 0, torch.arange(float(size))) for size in (1, 131_073, 3, 131_100, 393_000)
    ]
    host = HostCopy(pin=False)
    copies = host.copy(state)
    storage = copies["weight/w1@0"].untyped_storage()
    needed = sum(shard.values.nbytes for shard in state)
    assert needed <= storage.nbytes() <= needed + len(state) * ALIGNMENT * 4
    for shard in state:
        assert torch.equal(copies[shard.key], shard.values)
        assert copies[shard.key].untyped_storage().data_ptr() == storage.data_ptr()
        assert copies[shard.key].storage_offset() % ALIGNMENT == 0
    again = host.copy([shard._replace(values=shard.values + 1) for shard in state])
    assert all(torch.equal(again[shard.key], shard.values + 1) for shard in state)
    assert again["weight/w1@0"].untyped_storage().data_ptr() == storage.data_ptr()
    host.close()


def test_the_whole_buffer_is_pinned_once_and_given_back(monkeypatch):
    """By a CUDA runtime that notes what it is asked for."""
    calls = []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda *arguments: calls.append(("register", *arguments)) or 0,
        cudaHostUnregister=lambda *arguments: calls.append(("unregister", *arguments)) or 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append(("synchronize",)))
    host = HostCopy(pin=True)
    state = [StateShard("weight", name, 0, torch.ones(100)) for name in "ab"]
    address = host.copy(state)["weight/a@0"].data_ptr()
    host.copy(state)
    host.close()
    host.close()
    registered = ("register", address, 2 * 2 * ALIGNMENT * 4, 0)
    assert calls == [registered, ("synchronize",), ("synchronize",), ("unregister", address)]


@pytest.mark.parametrize(("size", "asked"), [(100, 1), (0, 0)])
def test_a_buffer_that_cannot_be_pinned_is_used_as_it_is(monkeypatch, size, asked):
    """As in a container that does not allow it, and by a process that holds no shard. CUDA's error is asked for, too,
    or an innocent operation would meet it."""
    calls, real = [], torch.zeros
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: calls.append("register") or 801)

    def zeros(*shape, device=None):
        if device != "cuda":
            return real(*shape, device=device)
        calls.append("launch")
        raise RuntimeError("CUDA error: operation not supported")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "zeros", zeros)
    host = HostCopy(pin=True)
    copies = host.copy([StateShard("weight", "a", 0, torch.arange(float(size)))])
    assert torch.equal(copies["weight/a@0"], torch.arange(float(size)))
    assert calls == ["register", "launch"] * asked
    host.close()
