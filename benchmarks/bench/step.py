"""One training step, computed by several variants from the same weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.machine import arithmetic
from hpcm_scale.config.schema import Checkpointing, Config, Precision
from hpcm_scale.model.arithmetic import Kernels, use_kernels
from hpcm_scale.model.compiled import compile_regions
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.objective import rate_distortion_loss
from hpcm_scale.training.optimizer import clip, create_optimizer
from hpcm_scale.training.task import image_noise

OPTIMIZER = "clipping and Adam"
"""Name of the optimizer's part of a step in a profile."""


@dataclass(frozen=True)
class Variant:
    """One way to compute a step; all give the same loss up to rounding."""

    precision: Precision = Precision.fp32
    checkpoint: Checkpointing = Checkpointing.none
    compiled: bool = False
    reference: bool = False
    """As the public implementation: NCHW, eager, torch's own layers."""

    @property
    def name(self) -> str:
        """Name in tables."""
        parts = [self.precision.value, "plain NCHW" if self.reference else "channels-last"]
        parts += ["compiled"] if self.compiled else []
        parts += [f"checkpoint={self.checkpoint.value}"] if self.checkpoint != Checkpointing.none else []
        return ", ".join(parts)


REFERENCE = Variant(reference=True)


class Steps:
    """Training steps on the same images by any number of variants, with one set of weights, gradients and moments.

    The learning rate is 0: Adam computes everything, and every step starts from the same weights.
    """

    def __init__(self, config: Config, batch: int, device: torch.device) -> None:
        self.config, self.device = config, device
        torch.manual_seed(config.train.seed)
        with device:  # initializing a large model is slow on a CPU
            model = HPCM(config.model).to(device)
        self._weights = model.state_dict(keep_vars=True)
        self._optimizer = create_optimizer(model, config.optimizer)
        side = config.data.crop
        self.images = torch.rand(batch, 3, side, side, device=device)

    def of(self, variant: Variant) -> Step:
        """A step computed by that variant."""
        with self.device:
            model = HPCM(
                self.config.model, precision=variant.precision, activation_checkpointing=variant.checkpoint
            ).to(self.device)
        model.load_state_dict(self._weights, assign=True)  # the same tensors, no copies
        if variant.compiled:
            compile_regions(model)
        return Step(self, variant, model.train())

    def optimize(self, drop: bool = True) -> None:
        """Clip the gradients and take the optimizer's step, as in training.

        `drop`: drop the gradients; false if a CUDA graph writes the next ones to the same tensors.
        """
        with torch.profiler.record_function(OPTIMIZER):
            clip(self._optimizer, self.config.train.clip_norm)
            self._optimizer.step()
            if drop:
                self._optimizer.zero_grad()

    def make_gradients(self) -> None:
        """Allocate the gradients of all weights as zeros."""
        for weight in self._weights.values():
            weight.grad = torch.zeros_like(weight)

    def drop_gradients(self) -> None:
        """Free the gradients of all weights."""
        self._optimizer.zero_grad()


class Step:
    """A training step of one variant (`Steps.of`); call it to take the step."""

    def __init__(self, steps: Steps, variant: Variant, model: HPCM) -> None:
        self.variant, self._steps, self._model = variant, steps, model
        memory_format = torch.contiguous_format if variant.reference else torch.channels_last
        self._images = steps.images.to(memory_format=memory_format)
        indices = torch.arange(len(self._images))
        self._noise = image_noise(model, self._images, indices, steps.config.train.seed)

    def __call__(self) -> Tensor:
        """Forward, loss, backward, clipping and Adam; returns the loss, a scalar on the device."""
        loss = self.gradients()
        self._steps.optimize()
        return loss

    def gradients(self) -> Tensor:
        """Forward, loss and backward only; adds to the gradients."""
        kernels = use_kernels(Kernels.reference) if self.variant.reference else nullcontext()
        with arithmetic(self.variant.precision), kernels:
            coded = self._model(self._images, self._noise)
            lmbda = self._steps.config.objective.lmbda
            loss = rate_distortion_loss(self._images, coded.x_hat, coded.bits_y, coded.bits_z, lmbda).loss.mean()
            loss.backward()
        return loss.detach()
