"""The engine: the only thing that knows about processes. The loop reads the same with either of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hpcm_scale.errors import Fault, UserError, in_a_line
from hpcm_scale.training.state_shards import Piece

Result = TypeVar("Result")
FAILURES = (UserError, OSError, MemoryError, RuntimeError)
"""What files, network drives and memory raise; torch's out-of-memory errors are RuntimeErrors."""


class FailedTogether(Exception):
    """Work that failed in one process or more; raised in all of them, with the same reason."""


class Stepped(NamedTuple):
    """What an optimizer step did."""

    grad_norm: float
    """Global 2-norm of the gradients before clipping."""
    skipped: bool
    """Whether the step was left out, on all processes together."""


class Engine(ABC):
    """Processes, sharding and the optimizer of one training."""

    rank: int
    world_size: int
    device: torch.device
    module: nn.Module
    """The prepared model: call it as the model itself, on all processes alike."""
    replicated: bool
    """Whether every process holds all of the weights and moments."""
    sharded: bool = False
    """Whether a forward pass gathers weights from all processes: one that fails in a single process blocks the others.
    """

    def building(self) -> AbstractContextManager[None]:
        """Where a model is made that may be sharded while it is made; every process makes the same, layer by layer."""
        return nullcontext()

    @abstractmethod
    def prepare(self, model: nn.Module) -> None:
        """Take over a model (same weights on every process): place, wrap or shard it."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's mean loss, a scalar.

        A loss that is not finite makes every gradient not finite, so that the step is skipped.
        """

    @abstractmethod
    def clip(self) -> Tensor:
        """Clip the accumulated gradients; returns their norm before, a scalar on the device, never looked at.

        NaN if there is none yet: DeepSpeed clips sharded gradients within the step.
        """

    @abstractmethod
    def step(self, learning_rate: float, norm: float, leave_out: bool = False) -> Stepped:
        """Apply the clipped gradients, or skip them if told to or if they are not finite; clear them.

        `norm`: what `clip` returned.
        """

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """What this process holds of weights and Adam moments, all of it where nothing is sharded (`replicated`)."""

    @abstractmethod
    def take_over(self, updates: int) -> None:
        """Go on from what has been written to the pieces, as after `updates` steps; every process calls it."""

    @property
    @abstractmethod
    def updates(self) -> int:
        """Optimizer steps that changed the weights."""

    @abstractmethod
    def reduce(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor, which itself stays as it is."""

    def gather(self, text: str) -> list[str]:
        """What every process says, in order of rank; each calls it with a text of its own, often empty."""
        said = text.encode(errors="surrogateescape")  # names of files need not be UTF-8
        lengths = torch.zeros(self.world_size, dtype=torch.float64)
        lengths[self.rank] = len(said)
        lengths = [int(length) for length in self.reduce(lengths).tolist()]
        letters = torch.zeros(self.world_size, max(lengths), dtype=torch.float32)
        letters[self.rank, : len(said)] = torch.tensor(list(said), dtype=torch.float32)
        rows = self.reduce(letters).to(torch.uint8).tolist() if max(lengths) else letters.tolist()
        return [bytes(row[:length]).decode(errors="surrogateescape") for row, length in zip(rows, lengths, strict=True)]

    def together(self, work: Callable[[], Result], *, forward: bool = False) -> Result:
        """What `work` returns, in every process; a `forward` pass is the only work that may communicate.

        Raises FailedTogether in all processes if the work fails in one, for any of FAILURES. A forward pass through
        sharded weights, in which the others wait for this process, raises a Fault in this one.
        """
        result, reason = None, ""
        try:
            result = work()
        except FAILURES as error:
            reason = in_a_line(error)
            if forward and self.sharded:
                raise Fault(
                    f"an evaluation failed ({reason}), and with sharded weights (engine.zero_stage=3) the run "
                    "cannot go on; leave out large images (eval.images, eval.limit), and the same command goes on"
                ) from error
        for told in self.gather(reason):
            if told:
                raise FailedTogether(told)
        return result

    def barrier(self) -> None:
        """Wait for all processes."""
        self.reduce(torch.zeros(1)).tolist()  # NCCL makes the device wait; reading the sum makes the host wait, too

    @abstractmethod
    def weights(self) -> dict[str, Tensor] | None:
        """The whole fp32 state dict in host memory on rank 0, None elsewhere; every process calls it."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the model. The process group stays for another run of the same processes."""


def poisoned(loss: Tensor) -> Tensor:
    """The loss, or, where it is not finite, one whose gradients are all NaN; needs no look at its value."""
    value = loss.detach()
    return loss * torch.where(value.isfinite(), torch.ones_like(value), torch.full_like(value, torch.nan))
