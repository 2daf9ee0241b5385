"""Checkpoints count only when they are whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpcm_scale.config.compose import compose
from hpcm_scale.errors import UserError
from hpcm_scale.training.accelerate_engine import AccelerateEngine
from hpcm_scale.training.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def engine() -> AccelerateEngine:
    """A real engine with a real, small model: one process, no group."""
    engine = AccelerateEngine(compose(["model=nano", "engine=accelerate"]))
    torch.manual_seed(0)
    engine.prepare(nn.Linear(4, 4))
    return engine


def train_step(engine: AccelerateEngine) -> float:
    loss = engine.module(torch.arange(8.0, device=engine.device).view(2, 4)).square().mean()
    engine.backward(loss)
    engine.step(1e-2)
    return loss.item()


def test_retention_and_marker(engine, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() is None
    (checkpoints.folder / "step_00000005").mkdir(parents=True)  # of a save that never finished
    for step in (10, 20, 30):
        checkpoints.save(engine, {"step": step, "note": "λ"}, keep=2)
        path, state = checkpoints.newest()
        assert path.name == f"step_{step:08d}" and state == {"step": step, "note": "λ"}
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step_00000020", "step_00000030"]
    checkpoints.save(engine, {"step": 100_000_000}, keep=1)
    assert [path.name for path in checkpoints.complete()] == ["step_100000000"]


def test_what_is_kept_for_good(engine, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20, 30, 40):
        checkpoints.save(engine, {"step": step}, keep=1, keep_at=[10, 30, 99])
    assert checkpoints.steps() == [10, 30, 40]
    assert checkpoints.at(30) == (tmp_path / "step_00000030", {"step": 30})
    assert checkpoints.at(20) is None and checkpoints.newest()[1] == {"step": 40}
    checkpoints.save(engine, {"step": 50}, keep=1)  # no longer asked for: the run was started again without
    assert checkpoints.steps() == [50]


def test_training_goes_on_from_a_checkpoint_bit_for_bit(engine, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for _ in range(3):
        train_step(engine)
    checkpoints.save(engine, {"step": 3}, keep=1)
    losses = [train_step(engine) for _ in range(3)]
    engine.load(checkpoints.newest()[0])
    assert [train_step(engine) for _ in range(3)] == losses
    assert losses[0] > losses[1] > losses[2]


def test_an_interrupted_save_leaves_the_last_one_valid(engine, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(engine, {"step": 10}, keep=1)

    def fails(folder) -> None:
        (folder / "engine.pt").write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr(engine, "save", fails)
        checkpoints.save(engine, {"step": 20}, keep=1)
    assert checkpoints.newest()[1] == {"step": 10}
    checkpoints.save(engine, {"step": 20}, keep=1)
    assert checkpoints.newest()[1] == {"step": 20}
    engine.load(checkpoints.newest()[0])
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000020"]


def test_a_damaged_marker_is_told_with_its_mend(engine, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(engine, {"step": 10}, keep=1)
    (tmp_path / "step_00000010" / "complete.json").write_text("{")
    with pytest.raises(UserError, match=r"step_00000010.* is damaged; remove .*step_00000010"):
        checkpoints.newest()
