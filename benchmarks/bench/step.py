"""One training step, computed in several ways from the same weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.machine import arithmetic
from bench.plain import plain
from hpcm_scale.config.schema import Checkpointing, Config, Precision
from hpcm_scale.model.compiled import compile_regions
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.objective import rate_distortion_loss
from hpcm_scale.training.optimizer import clip, create_optimizer
from hpcm_scale.training.task import image_noise

OPTIMIZER = "clipping and Adam"
"""What the optimizer's part of a step is called in a profile."""


@dataclass(frozen=True)
class Way:
    """One way to compute a step: all give the same loss, up to rounding."""

    precision: Precision = Precision.fp32
    checkpoint: Checkpointing = Checkpointing.none
    compiled: bool = False
    plain: bool = False
    """The same network without what makes it fast: NCHW, eager, torch's own layers."""

    @property
    def name(self) -> str:
        """For tables."""
        parts = [self.precision.value, "plain NCHW" if self.plain else "channels-last"]
        parts += ["compiled"] if self.compiled else []
        parts += [f"checkpoint={self.checkpoint.value}"] if self.checkpoint != Checkpointing.none else []
        return ", ".join(parts)


PLAIN = Way(plain=True)


class Steps:
    """Training steps on the same images, in any number of ways, with one set of weights, gradients and moments.

    The learning rate is 0: Adam does all its arithmetic, and every step begins with the same weights.
    """

    def __init__(self, config: Config, batch: int, device: torch.device) -> None:
        self.config, self.device = config, device
        torch.manual_seed(config.train.seed)
        with device:  # random numbers of a large model take long to draw on a CPU
            self._weights = HPCM(config.model).to(device).state_dict(keep_vars=True)
        self._optimizer = create_optimizer(self._weights.values(), config.train)
        side = config.data.crop
        self.images = torch.rand(batch, 3, side, side, device=device)

    def of(self, way: Way) -> Step:
        """A step computed in that way."""
        with self.device:
            model = HPCM(self.config.model, precision=way.precision, checkpoint=way.checkpoint).to(self.device)
        model.load_state_dict(self._weights, assign=True)  # the same tensors, not copies of them
        if way.compiled:
            compile_regions(model)
        return Step(self, way, model.train())

    def optimize(self, drop: bool = True) -> None:
        """Clip the gradients and take the optimizer's step, as training does; then drop the gradients, unless a CUDA
        graph writes the next ones to the same tensors."""
        with torch.profiler.record_function(OPTIMIZER):
            clip(self._optimizer, self.config.train.clip_norm)
            self._optimizer.step()
            if drop:
                self._optimizer.zero_grad()

    def make_gradients(self) -> None:
        """Zeros as gradients of all weights, so that a step adds to what is there."""
        for weight in self._weights.values():
            weight.grad = torch.zeros_like(weight)

    def drop_gradients(self) -> None:
        """As after `optimize`."""
        self._optimizer.zero_grad()


class Step:
    """See `Steps.of`; call it for one whole step."""

    def __init__(self, steps: Steps, way: Way, model: HPCM) -> None:
        self.way, self._steps, self._model = way, steps, model
        memory_format = torch.contiguous_format if way.plain else torch.channels_last
        self._images = steps.images.to(memory_format=memory_format)
        indices = torch.arange(len(self._images))
        self._noise = image_noise(model, self._images, indices, steps.config.train.seed)

    def __call__(self) -> Tensor:
        """Forward, loss, backward, clipping and Adam; returns the loss, a scalar on the device."""
        loss = self.gradients()
        self._steps.optimize()
        return loss

    def gradients(self) -> Tensor:
        """Forward, loss and backward only; the gradients are added to what is there."""
        with arithmetic(self.way.precision), plain() if self.way.plain else nullcontext():
            coded = self._model(self._images, self._noise)
            lmbda = self._steps.config.objective.lmbda
            loss = rate_distortion_loss(self._images, coded.x_hat, coded.bits_y, coded.bits_z, lmbda).loss.mean()
            loss.backward()
        return loss.detach()
