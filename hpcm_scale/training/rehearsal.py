"""A training step on fake tensors: the memory it would take, what it would launch, and in which order it would read the
weights."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from hpcm_scale.compute.launches import Launches
from hpcm_scale.compute.memory import PeakMemory
from hpcm_scale.config.schema import Checkpointing, ModelConfig, Precision
from hpcm_scale.model.gpu_ways import gpu_ways
from hpcm_scale.model.hpcm import HPCM, Noise
from hpcm_scale.objective.rate_distortion import rate_distortion_loss
from hpcm_scale.training.gathering import Use


class Rehearsal(NamedTuple):
    """What a forward and backward pass over one micro-batch would do."""

    activations: int
    """Most bytes in use at a time, without weights and their gradients: what is kept for the backward pass, and at
    the peak also what is being computed, or computed again."""
    uses: list[Use]
    """In their order: forward, then backward, where layers that are computed again are used forward once more."""
    launches: int
    """Operations, as `Launches` counts them; those of the optimizer and of communication come on top."""


def rehearse(
    config: ModelConfig, precision: Precision, checkpoint: Checkpointing, side: int, images: int, gpu: bool = False
) -> Rehearsal:
    """Rehearse a step over side×side crops, eager, channels last; takes seconds and no memory.

    `gpu`: as on a GPU, whose layers take other ways to the same result (`model.gpu_ways`); else as on this CPU.
    """
    # Fake tensors, unlike those on `meta`, know autocast.
    with FakeTensorMode(), gpu_ways() if gpu else nullcontext():
        model = HPCM(config, precision=precision, checkpoint=checkpoint)
        x = torch.empty(images, 3, side, side).to(memory_format=torch.channels_last)
        noise = Noise(*(torch.empty(images, *shape) for shape in model.latent_shapes(side, side)))
        uses = _record_uses(model)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
        with PeakMemory() as memory, Launches() as launches:
            coded = model(x, noise)
            rate_distortion_loss(x, coded.x_hat, coded.bits_y, coded.bits_z, 0.013).loss.mean().backward()
    return Rehearsal(memory.peak, uses, launches.total)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None  # counted apart, and given away at once with ZeRO-2 and ZeRO-3


def _record_uses(model: nn.Module) -> list[Use]:
    """A list that grows with every use of a layer that has weights of its own."""
    uses: list[Use] = []

    def follow(layer: nn.Module, weights: tuple[tuple[str, int], ...]) -> None:
        def forward(layer: nn.Module, inputs: object) -> None:  # before it: recomputation leaves its last layer early
            uses.append(Use(False, weights))

        def backward(layer: nn.Module, inputs: object, output: object) -> None:
            first = tree_leaves(output)[0]
            if first.requires_grad:
                first.register_hook(lambda gradient: uses.append(Use(True, weights)))

        layer.register_forward_pre_hook(forward)
        layer.register_forward_hook(backward)

    for prefix, layer in model.named_modules():
        weights = tuple((f"{prefix}.{name}", value.numel()) for name, value in layer.named_parameters(recurse=False))
        if weights:
            follow(layer, weights)
    return uses
