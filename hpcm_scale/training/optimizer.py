"""The optimizer, which can skip a step, and the learning-rate schedule."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from math import sqrt

import torch
from torch import Tensor, nn

from hpcm_scale.config.schema import OptimizerConfig, ScheduleConfig
from hpcm_scale.model.parameters import learning_rate_factor, matrices, spectral_factor
from hpcm_scale.training.matrix_optimizers import Exchange, Layout, MatrixGroup, Member, Muon, rule_of
from hpcm_scale.training.state_shards import StateShard


def learning_rate(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`; a function of the step only, so it needs no saved state.

    The final decay is 1 − √progress, the cooldown that arXiv 2405.18392 found better than a linear one.
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
    """Step after which the learning rate decays in a run of `steps`, maybe fractional; `steps` if there is no decay."""
    return steps - (schedule.decay * steps if schedule.decay <= 1 else schedule.decay)


class GuardedOptimizer(torch.optim.Adam):
    """Adam, and Muon or SOAP for matrices; `step` does nothing while `overflow` is set: DeepSpeed then skips the step.

    The matrices that do not have Adam are one group of parameters, the others one per factor of the learning rate.
    """

    overflow = False

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        """For the parameters of a model, whole or sharded by ZeRO-3; call `place` before the first step."""
        self._config, self._names = config, {parameter: name for name, parameter in model.named_parameters()}
        found = matrices(model)
        self._matrices = {name: matrix for name, matrix in found.items() if rule_of(matrix, config)}
        groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
        for parameter, name in self._names.items():
            factor = 1.0 if name in self._matrices else learning_rate_factor(parameter)
            decay = config.weight_decay if name in found else 0.0
            groups.setdefault((name in self._matrices, factor, decay), []).append(parameter)
        beta1, beta2 = config.betas
        super().__init__(
            [
                {"params": members, "matrices": is_matrix, "factor": factor, "weight_decay": decay / factor}
                for (is_matrix, factor, decay), members in groups.items()
            ],
            lr=0.0,  # set at every step
            betas=(beta1, beta2),
            decoupled_weight_decay=True,
            fused=True,
        )

    def place(self, layouts: dict[str, Layout] | None = None, rank: int = 0, exchange: Exchange | None = None) -> None:
        """Allocate the state of matrices, for parameters in `layouts`, by name; by default every rank has them whole.

        Matrices of one `held` tensor, or of whole parameters, are updated together. `exchange` is needed if parameters
        are cut into parts.
        """
        held = {name: Layout(parameter, 0, (0, parameter.numel())) for parameter, name in self._names.items()}
        self._layouts, self._rank = held if layouts is None else layouts, rank
        first = {parameter: group["params"][0] for group in self.param_groups for parameter in group["params"]}
        together: dict[Tensor, list[Member]] = {}
        for parameter, name in self._names.items():
            if name in self._matrices:
                matrix, layout = self._matrices[name], self._layouts[name]
                factor = spectral_factor if rule_of(matrix, self._config) is Muon else learning_rate_factor
                key = first.get(layout.held, layout.held)
                together.setdefault(key, []).append(Member(name, matrix, layout, factor(parameter)))
        self._groups = {key: MatrixGroup(members, self._config, rank, exchange) for key, members in together.items()}

    def step(self, closure=None):
        """Take a step; with matrices on several ranks all ranks call it together. `closure` is not supported."""
        assert closure is None
        if self.overflow:
            return
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["matrices"] and group["params"]:
                self._groups[group["params"][0]].step(group["lr"], group["weight_decay"])

    @property
    def updates(self) -> int:
        """Number of steps taken, without skipped ones."""
        steps = [state["step"] for state in self.state.values() if state]
        adam = int(torch.stack(steps).max()) if steps else 0
        return max([adam, *(group.updates for group in self._groups.values())])

    def set_updates(self, updates: int) -> None:
        """Set the number of steps taken, for the bias correction; `state_shards`, called before, creates the state."""
        for state in self.state.values():
            if state:
                state["step"].fill_(updates)
        for group in self._groups.values():
            group.updates = updates

    def state_shards(self) -> Iterator[StateShard]:
        """Shards of the weights and of the state that this rank has. Missing moments are created as zeros."""
        for name, layout in self._layouts.items():
            kinds = {"weight": layout.held}
            if name not in self._matrices:
                kinds |= self._moments(layout.held)
            for kind, values in kinds.items():
                if layout.size(self._rank):
                    part = layout.part(values.detach().view(-1), self._rank)
                    yield StateShard(kind, name, layout.cuts[self._rank], part)
        for group in self._groups.values():
            yield from group.state_shards()

    def _moments(self, held: Tensor) -> dict[str, Tensor]:
        state = self.state[held]
        if not state:
            state["step"] = torch.zeros((), device=held.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(held), torch.zeros_like(held)
        return {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq")}


def create_optimizer(model: nn.Module, config: OptimizerConfig) -> GuardedOptimizer:
    """The optimizer of a model that every rank has whole; the learning rate is set at every step."""
    optimizer = GuardedOptimizer(model, config)
    optimizer.place()
    return optimizer


def clip(optimizer: torch.optim.Optimizer, clip_norm: float) -> Tensor:
    """Clip the global gradient norm to `clip_norm`.

    Returns the norm before clipping, a scalar on the device that may be NaN or infinite.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, clip_norm)


def guard(optimizer: GuardedOptimizer, norm: float, skip: bool) -> None:
    """Skip the next step if `skip`, or if the gradient norm is not finite."""
    optimizer.overflow = skip or not math.isfinite(norm)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the next step, times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]
