"""Interface of the engines, the only part of training that communicates between ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed
from torch import Tensor, nn

from hpcm_scale.errors import Fault, UserError, first_line
from hpcm_scale.training.optimizer import GuardedOptimizer
from hpcm_scale.training.state_shards import StateShard

Result = TypeVar("Result")
FAILURES = (UserError, OSError, MemoryError, RuntimeError)
"""Errors of files, network drives and memory; torch's out-of-memory errors are RuntimeErrors."""


class CollectiveError(Exception):
    """Work that failed on at least one rank; raised on all ranks with the same reason."""


class StepResult(NamedTuple):
    """Result of an optimizer step."""

    grad_norm: float
    """Global 2-norm of the gradients before clipping."""
    skipped: bool
    """Whether the step was skipped, on all ranks."""


class Engine(ABC):
    """Processes, sharding and optimizer of one training."""

    rank: int
    world_size: int
    device: torch.device
    module: nn.Module
    """The prepared model; all ranks call it together."""
    replicated: bool
    """Whether every rank holds all weights and the whole state of the optimizer."""
    sharded: bool = False
    """Whether a forward pass gathers weights (ZeRO-3), so that one that fails on a single rank blocks the others."""
    _optimizer: GuardedOptimizer

    def building(self) -> AbstractContextManager[None]:
        """Context in which all ranks create the same model, which ZeRO-3 shards layer by layer."""
        return nullcontext()

    @abstractmethod
    def prepare(self, model: nn.Module) -> None:
        """Place, wrap or shard a model with the same weights on every rank, and create its optimizer."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss, a scalar.

        A loss that is not finite makes all gradients NaN, so that the step is skipped.
        """

    @abstractmethod
    def clip(self) -> Tensor:
        """Clip the accumulated gradients; pre-clip gradient norm as a device tensor (no host sync).

        NaN with ZeRO 1 to 3, where DeepSpeed clips within the step.
        """

    @abstractmethod
    def step(self, learning_rate: float, norm: float, skip: bool = False) -> StepResult:
        """Apply the clipped gradients and clear them; no update if `skip` or if they are not finite.

        `norm` is the result of `clip`.
        """

    def state_shards(self) -> list[StateShard]:
        """Master weights and state of the optimizer that this rank holds, or all of it if `replicated`."""
        return [*self._optimizer.state_shards()]

    @abstractmethod
    def load_master_weights(self, updates: int) -> None:
        """Update the model from values written to `state_shards`, as after `updates` steps; called by all ranks."""

    @property
    def updates(self) -> int:
        """Optimizer steps that changed the weights."""
        return self._optimizer.updates

    @abstractmethod
    def reduce(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, as a new tensor on the device."""

    def gather(self, value: Any) -> list[Any]:
        """One value of each rank, in order of rank; called by all ranks with values that can be pickled."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def run_collectively(self, work: Callable[[], Result], *, forward: bool = False) -> Result:
        """The result of `work`, which all ranks do; only a `forward` pass may communicate.

        Raises CollectiveError on all ranks if the work raises one of FAILURES on any rank. In a forward pass through
        sharded weights the other ranks wait for this one, so it raises Fault instead.
        """
        result, reason = None, ""
        try:
            result = work()
        except FAILURES as error:
            reason = first_line(error)
            if forward and self.sharded:
                raise Fault(
                    "sharded-evaluation-failed",
                    "eval.images",
                    f"an evaluation failed ({reason}), after which a run with sharded weights (engine.zero_stage=3) "
                    "cannot continue; remove large images (eval.images, eval.limit), and the same command resumes",
                ) from error
        if reasons := [reason for reason in self.gather(reason) if reason]:
            raise CollectiveError(reasons[0])
        return cast(Result, result)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.reduce(torch.zeros(1)).tolist()  # under NCCL only reading the sum makes the host wait

    @abstractmethod
    def weights(self) -> dict[str, Tensor] | None:
        """The whole fp32 state dict in host memory on rank 0, None elsewhere; called by all ranks."""

    @abstractmethod
    def close(self) -> None:
        """Release the model. The process group stays for another run of the same processes."""


def propagate_non_finite(loss: Tensor) -> Tensor:
    """The loss; if it is not finite, all its gradients become NaN (no host sync)."""
    value = loss.detach()
    return loss * torch.where(value.isfinite(), torch.ones_like(value), torch.full_like(value, torch.nan))
