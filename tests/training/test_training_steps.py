"""Means over steps, and steps that must not be taken."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from hpcm_scale.config.compose import compose_model
from hpcm_scale.config.schema import Fusion, OptimizerConfig
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.distributed.processes import without_launcher_arguments
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.objective import rate_distortion_loss
from hpcm_scale.training.engines.base import propagate_non_finite
from hpcm_scale.training.optimizer import clip, create_optimizer, guard, set_learning_rate
from hpcm_scale.training.recorder import Meter
from hpcm_scale.training.task import image_noise


def test_the_meter_averages_finite_steps_and_counts_the_others():
    meter = Meter()
    meter.add({"loss": 2.0, "grad_norm": 1.0}, skipped=False)
    meter.add({"loss": math.nan, "grad_norm": None}, skipped=True)
    meter.add({"loss": 4.0, "grad_norm": 3.0}, skipped=False)
    resumed = Meter(**json.loads(json.dumps(asdict(meter))))
    assert resumed.take(["loss", "grad_norm"]) == {"loss": 3.0, "grad_norm": 2.0, "skipped": 1}
    assert resumed.take(["loss"]) == {"loss": None, "skipped": 0}
    assert meter.take(["loss"])["loss"] == 3.0


def test_a_loss_that_is_not_finite_poisons_every_gradient():
    for value in (math.inf, -math.inf, math.nan):
        weights = torch.ones(3, requires_grad=True)
        propagate_non_finite((weights * torch.tensor([0.0, 1.0, 2.0])).sum() + value).backward()
        assert weights.grad.isnan().all()
    weights = torch.ones(3, requires_grad=True)
    propagate_non_finite((weights**2).sum()).backward()
    assert torch.equal(weights.grad, torch.full((3,), 2.0))


def test_the_guarded_adam_leaves_a_bad_step_out_and_goes_on():
    torch.manual_seed(0)
    reference, guarded = nn.Linear(4, 3), nn.Linear(4, 3)
    guarded.load_state_dict(reference.state_dict())
    optimizers = [create_optimizer(layer, OptimizerConfig()) for layer in (reference, guarded)]
    x = torch.randn(5, 4)

    def step(layer, optimizer, scale: float, skip: bool = False) -> float:
        set_learning_rate(optimizer, 1e-2)
        (layer(x).square().sum() * scale).backward()
        norm = float(clip(optimizer, clip_norm=1.0))
        guard(optimizer, norm, skip)
        optimizer.step()
        optimizer.zero_grad()
        return norm

    for _ in range(3):
        norms = [step(layer, optimizer, 1.0) for layer, optimizer in zip((reference, guarded), optimizers, strict=True)]
        assert norms[0] == norms[1] > 1
    assert not math.isfinite(step(guarded, optimizers[1], math.nan))
    assert optimizers[1].overflow
    assert math.isfinite(step(guarded, optimizers[1], 1.0, skip=True))
    for _ in range(3):
        assert step(reference, optimizers[0], 1.0) == step(guarded, optimizers[1], 1.0)
    assert not optimizers[1].overflow
    assert torch.equal(reference.weight, guarded.weight)


def test_the_launchers_argument_is_taken_out():
    arguments = ["--local_rank=3", "model=nano", "-m"]
    assert without_launcher_arguments(arguments) == ["model=nano", "-m"]


@pytest.mark.launch
def test_a_model_learns_within_a_few_steps(image_folder):
    """From its own initialisation, on one crop: more than half of the loss is gone after 40 steps."""
    torch.manual_seed(0)
    model = HPCM(replace(compose_model("nano"), fusion=Fusion.none))
    optimizer = create_optimizer(model, OptimizerConfig())
    set_learning_rate(optimizer, 5e-3)
    x = ImageSet(image_folder, limit=1).load(0)[None, :, 128:256, 256:384].float() / 255
    losses = []
    for index in range(40):
        coded = model(x, image_noise(model, x, torch.tensor([index]), seed=0))
        result = rate_distortion_loss(x, coded.x_hat, coded.bits_y, coded.bits_z, 0.013).mean()
        result.loss.backward()
        clip(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(result.loss.item())
    assert max(losses[-5:]) < 0.5 * losses[0]
