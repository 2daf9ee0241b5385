"""Adam that leaves out a step when told to."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from math import sqrt

import torch
from torch import Tensor, nn

from hpcm_scale.config.schema import ScheduleConfig, TrainConfig
from hpcm_scale.model.parameters import learning_rate_factor
from hpcm_scale.training.state_shards import Piece

# The learning rate as a function of the step, nothing else: a resumed run needs no state for it.


def learning_rate(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (from 0) in a run of `steps`.

    The decay at the end is 1 − √progress, the best of those compared in arXiv 2405.18392, section 4.
    """
    boundaries = schedule.boundaries
    fractions = bool(boundaries) and boundaries[-1] <= 1
    position = step / steps if fractions else step
    factor = schedule.factors[bisect_right(boundaries, position)]
    warmup = min(1.0, (step + 1) / schedule.warmup) if schedule.warmup else 1.0
    start = decay_start(schedule, steps)
    decay = 1 - sqrt((step - start) / (steps - start)) if start < step < steps else 1.0
    return schedule.learning_rate * factor * warmup * decay


def decay_start(schedule: ScheduleConfig, steps: int) -> float:
    """The step at which the decay at the end of a run of `steps` begins; `steps` where there is none."""
    return steps - (schedule.decay * steps if schedule.decay <= 1 else schedule.decay)


class GuardedAdam(torch.optim.Adam):
    """Adam; while `overflow` is set, `step` leaves weights and moments as they are.

    DeepSpeed reads the same attribute from its own optimizers and counts the step as skipped.
    """

    overflow = False

    def step(self, closure=None):
        return None if self.overflow else super().step(closure)

    @property
    def updates(self) -> int:
        """Steps taken, those left out not counted."""
        steps = [state["step"] for state in self.state.values()]
        return int(torch.stack(steps).max()) if steps else 0

    def set_updates(self, updates: int) -> None:
        """Go on as after so many steps."""
        for state in self.state.values():
            state["step"].fill_(updates)

    def pieces(self, name: str, start: int, held: Tensor, offset: int, size: int) -> Iterator[Piece]:
        """Elements offset … offset + size − 1 of `held`, a flat tensor that is optimized, and of its moments: they
        are the parameter `name` from element `start` on. Moments that there are not yet are made, zero."""
        state = self.state[held]
        if not state:
            state["step"] = torch.zeros((), device=held.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(held), torch.zeros_like(held)
        for kind, tensor in (("weight", held), ("exp_avg", state["exp_avg"]), ("exp_avg_sq", state["exp_avg_sq"])):
            yield Piece(kind, name, start, tensor.detach().view(-1)[offset : offset + size])


def create_optimizer(parameters: Iterable[nn.Parameter], train: TrainConfig) -> GuardedAdam:
    """Adam with the configured betas, each update one pass over memory; the learning rate is set at every step.

    Parameters with one `learning_rate_factor` make a group.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(learning_rate_factor(parameter), []).append(parameter)
    described = [{"params": members, "factor": factor} for factor, members in groups.items()]
    return GuardedAdam(described, lr=0.0, betas=tuple(train.betas), fused=True)


def clip(optimizer: torch.optim.Optimizer, clip_norm: float) -> Tensor:
    """Clip the global gradient norm; returns the norm, a scalar on the device, finite or not."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, clip_norm)


def guard(optimizer: GuardedAdam, norm: float, leave_out: bool) -> None:
    """Have the next step left out if asked to, or if the gradient norm is not finite."""
    optimizer.overflow = leave_out or not math.isfinite(norm)


def whole_pieces(optimizer: GuardedAdam, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[Piece]:
    """The pieces of named parameters that are not sharded."""
    return [
        piece for name, held in parameters for piece in optimizer.pieces(name, 0, held, offset=0, size=held.numel())
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of the next step, times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]
