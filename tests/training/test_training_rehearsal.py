"""The memory of a step on fake tensors, against a real one's."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from bench.timing import peak_bytes
from small_training import FEW_BLOCKS, TINY

from hpcm_scale.compute.tracker import PeakMemory
from hpcm_scale.config.compose import compose
from hpcm_scale.config.schema import Checkpointing, ModelConfig, Precision
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.objective import rate_distortion_loss
from hpcm_scale.training.dry_run import dry_run
from hpcm_scale.training.task import image_noise

TOLERANCE = {Precision.fp32: 0.001, Precision.bf16: 0.05}
"""Kernels of the CPU take memory of their own for bf16."""


@pytest.mark.launch
@pytest.mark.parametrize(
    "network", [pytest.param(FEW_BLOCKS, id="few blocks"), pytest.param((), id="micro", marks=pytest.mark.long)]
)
@pytest.mark.parametrize(
    ("precision", "checkpoint"),
    [
        (Precision.fp32, Checkpointing.none),
        (Precision.bf16, Checkpointing.blocks),
        (Precision.fp32, Checkpointing.steps),
    ],
)
def test_a_rehearsed_step_takes_the_memory_of_a_real_one(precision, checkpoint, network):
    """By the allocations that torch's profiler saw."""
    config = compose(["model=micro", *network]).model
    model = HPCM(config, precision=precision, activation_checkpointing=checkpoint)
    x = torch.rand(2, 3, 256, 256).to(memory_format=torch.channels_last)
    noise = image_noise(model, x, torch.arange(2), seed=0)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))

    def step() -> None:
        coded = model(x, noise)
        rate_distortion_loss(x, coded.x_hat, coded.bits_y, coded.bits_z, 0.013).loss.mean().backward()

    measured = peak_bytes(step, x.device)
    rehearsed = dry_run(model.config, precision, checkpoint, 256, 2).activations
    assert rehearsed == pytest.approx(measured, rel=TOLERANCE[precision])


@pytest.mark.launch
def test_memory_grows_with_the_crops():
    config = compose([*TINY]).model
    one, two = (dry_run(config, Precision.fp32, Checkpointing.none, 256, images).activations for images in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.02)


def test_peak_memory_counts_every_storage_once_and_while_it_is_there():
    before = torch.zeros(1000)
    with PeakMemory() as memory:
        before.add_(1).view(10, 100)
        first = torch.zeros(100)
        first[:50].mul_(2)
        del first
        second = before + 1
    assert memory.peak == second.nbytes == 4000


@pytest.mark.launch
def test_uses_follow_the_step():
    """Every layer is used backward where its result counts, and once more forward where it is computed again."""
    config = compose([*TINY]).model
    plain, again = (_uses(config, checkpoint) for checkpoint in (Checkpointing.none, Checkpointing.steps))
    names = {name for name, _ in HPCM(config).named_parameters()}
    for uses in (plain, again):
        assert {name for weights in uses[True] for name, _ in weights} == names
        assert uses[True] <= uses[False]
    assert plain[True] == again[True]
    assert plain[False] < again[False] <= plain[False] + plain[False]


def _uses(config: ModelConfig, checkpoint: Checkpointing) -> dict[bool, Counter]:
    """How often each layer is used, backward or not."""
    uses = dry_run(config, Precision.fp32, checkpoint, 256, 1).uses
    return {backward: Counter(use.weights for use in uses if use.backward == backward) for backward in (False, True)}
