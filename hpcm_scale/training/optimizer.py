"""Adam that can skip a step, and the learning-rate schedule."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from math import sqrt

import torch
from torch import Tensor, nn

from hpcm_scale.config.schema import ScheduleConfig, TrainConfig
from hpcm_scale.model.parameters import learning_rate_factor
from hpcm_scale.training.state_shards import StateShard


def learning_rate(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`; a function of the step only, so it needs no saved state.

    The final decay is 1 − √progress, the best shape in arXiv 2405.18392, section 4.
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
    """First step of the final decay in a run of `steps`; `steps` if there is no decay."""
    return steps - (schedule.decay * steps if schedule.decay <= 1 else schedule.decay)


class GuardedAdam(torch.optim.Adam):
    """Adam whose `step` does nothing while `overflow` is set; DeepSpeed then counts the step as skipped."""

    overflow = False

    def step(self, closure=None):
        return None if self.overflow else super().step(closure)

    @property
    def updates(self) -> int:
        """Number of steps taken, without skipped ones."""
        steps = [state["step"] for state in self.state.values()]
        return int(torch.stack(steps).max()) if steps else 0

    def set_updates(self, updates: int) -> None:
        """Set the number of steps taken, for the bias correction."""
        for state in self.state.values():
            state["step"].fill_(updates)

    def state_shards(self, name: str, start: int, held: Tensor, offset: int, size: int) -> Iterator[StateShard]:
        """Shards of weight and moments that are elements offset … offset + size − 1 of the optimized tensor `held`.

        They belong to the parameter `name` from its element `start` on. Missing moments are created as zeros.
        """
        state = self.state[held]
        if not state:
            state["step"] = torch.zeros((), device=held.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(held), torch.zeros_like(held)
        for kind, tensor in (("weight", held), ("exp_avg", state["exp_avg"]), ("exp_avg_sq", state["exp_avg_sq"])):
            yield StateShard(kind, name, start, tensor.detach().view(-1)[offset : offset + size])


def create_optimizer(parameters: Iterable[nn.Parameter], train: TrainConfig) -> GuardedAdam:
    """Fused Adam with the configured betas and one group per `learning_rate_factor`; the rate is set at every step."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(learning_rate_factor(parameter), []).append(parameter)
    param_groups = [{"params": members, "factor": factor} for factor, members in groups.items()]
    beta1, beta2 = train.betas
    return GuardedAdam(param_groups, lr=0.0, betas=(beta1, beta2), fused=True)


def clip(optimizer: torch.optim.Optimizer, clip_norm: float) -> Tensor:
    """Clip the global gradient norm to `clip_norm`; the norm before, a device scalar that may be NaN or infinite."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, clip_norm)


def guard(optimizer: GuardedAdam, norm: float, skip: bool) -> None:
    """Skip the next step if `skip`, or if the gradient norm is not finite."""
    optimizer.overflow = skip or not math.isfinite(norm)


def unsharded_state(optimizer: GuardedAdam, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[StateShard]:
    """Weights and moments of named parameters that are not sharded."""
    return [
        shard
        for name, held in parameters
        for shard in optimizer.state_shards(name, 0, held, offset=0, size=held.numel())
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of the next step, times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]
