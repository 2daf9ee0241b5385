"""Adam that leaves out a step when told to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hpcm_scale.config.schema import TrainConfig


class GuardedAdam(torch.optim.Adam):
    """Adam; while `overflow` is set, `step` leaves weights and moments as they are.

    DeepSpeed reads the same attribute from its own optimizers and counts the step as skipped.
    """

    overflow = False

    def step(self, closure=None):
        return None if self.overflow else super().step(closure)


def create_optimizer(parameters: Iterable[nn.Parameter], train: TrainConfig) -> GuardedAdam:
    """Adam with the configured betas; the learning rate is set at every step."""
    return GuardedAdam(parameters, lr=0.0, betas=tuple(train.betas))


def clip_and_guard(optimizer: GuardedAdam, clip_norm: float) -> Tensor:
    """Clip the global gradient norm; mark the step to be left out if it is not finite. Returns the norm."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimizer.overflow = not bool(norm.isfinite())
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
