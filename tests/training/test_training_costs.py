"""Memory, FLOPs and time of a run."""

from __future__ import annotations

import pytest
import torch

from hpcm_scale.compute.flops import saved_bytes
from hpcm_scale.config.compose import compose, compose_model
from hpcm_scale.config.schema import Precision
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.shapes import on_meta
from hpcm_scale.objective.rate_distortion import rate_distortion_loss
from hpcm_scale.training import estimate as estimates
from hpcm_scale.training.accelerate_engine import AccelerateEngine
from hpcm_scale.training.costs import activation_bytes, training_flops_per_image
from hpcm_scale.training.noise import image_noise


@pytest.mark.parametrize("precision", Precision)
def test_activations_on_fake_tensors_are_those_of_a_real_pass(precision):
    model = HPCM(compose_model("nano"), precision=precision)
    x = torch.rand(2, 3, 256, 256)
    noise = image_noise(model, x, torch.tensor([0, 1]), seed=0)

    def forward() -> torch.Tensor:
        coded = model(x, noise)
        return rate_distortion_loss(x, coded.x_hat, coded.bits_y, coded.bits_z, 0.013).loss.mean()

    assert activation_bytes(model.config, precision, 256, 2) == saved_bytes(forward)


def test_activations_grow_with_the_crops_and_shrink_with_precision():
    config = compose_model("nano")
    one, two = (activation_bytes(config, Precision.fp32, 256, images) for images in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.01)
    assert activation_bytes(config, Precision.fp32, 512, 1) == pytest.approx(4 * one, rel=0.01)
    assert 0.5 * one < activation_bytes(config, Precision.bf16, 256, 1) < 0.85 * one


@pytest.fixture(autouse=True, scope="module")
def worked_out_once():
    """The same activations and FLOPs are asked for by many tests below, and take a second each."""
    known: dict[str, int] = {}

    def once(function):
        def answer(*arguments) -> int:
            key = repr((function.__name__, arguments))
            if key not in known:
                known[key] = function(*arguments)
            return known[key]

        return answer

    with pytest.MonkeyPatch.context() as patched:
        for name in ("activation_bytes", "training_flops_per_image"):
            patched.setattr(estimates, name, once(getattr(estimates, name)))
        yield


def needs(*overrides: str, world_size: int = 1) -> estimates.Estimate:
    """The estimate of a run of micro."""
    return estimates.estimate(compose(["model=micro", "train.batch_size=8", *overrides]), world_size)


# Bytes per parameter: weights, gradients, optimizer. Measured as tensors alive after a step of a real engine of
# DeepSpeed 0.19.8 on one process, which shards nothing away: stages 1 and 2 keep a second, flat copy of the weights
# for the optimizer; stage 3 a flat copy beside the gathered ones.
ONE_PROCESS = {
    "accelerate": (4, 4, 8),
    "zero0": (4, 4, 8),
    "zero1": (4, 4, 12),
    "zero2": (4, 4, 12),
    "zero3": (8, 4, 8),
}


@pytest.mark.parametrize("engine_name", ONE_PROCESS)
def test_memory_on_one_process(engine_name):
    result = needs(f"engine={engine_name}")
    memory, expected = result.memory, ONE_PROCESS[engine_name]
    measured = memory.weights, memory.gradients, memory.optimizer
    assert [value / result.parameters for value in measured] == pytest.approx(expected)
    assert memory.host == 0
    assert memory.activations == activation_bytes(compose_model("micro"), Precision.fp32, 256, 8)
    assert memory.device >= sum(measured) + memory.activations


# What is divided over the processes: nothing, the optimizer, also the gradients, also the weights.
@pytest.mark.parametrize(("engine_name", "shared"), [("zero0", ""), ("zero1", "o"), ("zero2", "og"), ("zero3", "ogw")])
def test_memory_on_eight_processes(engine_name, shared):
    alone, memory = needs(f"engine={engine_name}").memory, needs(f"engine={engine_name}", world_size=8).memory
    assert memory.gradients == pytest.approx(alone.gradients / (8 if "g" in shared else 1), rel=1e-5)
    assert memory.optimizer == pytest.approx(alone.optimizer / (8 if "o" in shared else 1), rel=1e-5)
    if "w" in shared:  # a share, and the layers gathered at a time: all of them for so small a model
        assert memory.weights == pytest.approx(alone.weights / 2 * (1 + 1 / 8), rel=1e-5)
    else:
        assert memory.weights == alone.weights
    assert memory.activations == pytest.approx(alone.activations / 8, rel=0.05)


def test_offload_keeps_the_state_in_host_memory():
    memory = needs("engine=zero3_offload", world_size=2).memory
    assert memory.gradients == memory.optimizer == 0
    assert memory.host == pytest.approx((4 + 4 + 12) * needs().parameters / 2, rel=1e-5)


def test_accumulation_costs_no_memory():
    whole, parts = needs(), needs("train.micro_batch_size=1")
    assert parts.memory.activations < whole.memory.activations / 7
    assert parts.pflops == whole.pflops


def test_flops_and_time_of_a_run():
    result = needs("train.steps=1000")
    flops = training_flops_per_image(on_meta(compose_model("micro")), 256)
    assert result.images == 8000 and result.flops_per_image == flops
    assert result.pflops == pytest.approx(8000 * flops / 1e15)
    assert result.seconds(peak=1e15, mfu=0.5) == pytest.approx(2 * result.pflops)


def test_bytes_of_a_checkpoint():
    engine = AccelerateEngine(compose(["model=nano", "engine=accelerate"]))
    engine.prepare(HPCM(compose_model("nano")))
    assert (
        sum(piece.values.nbytes for piece in engine.pieces())
        == estimates.estimate(compose(["model=nano"]), 2).checkpoint
    )
