"""What the processes of a run send each other, and how much of the time for it hides behind computing.

Ring algorithms over n processes: to reduce-scatter or all-gather b bytes each process sends b·(n − 1)/n, to
all-reduce them twice that. Checked against what two processes send with DeepSpeed 0.19.8 and with accelerate's DDP.
"""

from __future__ import annotations

from typing import NamedTuple

from hpcm_scale.config.checks import accumulation
from hpcm_scale.config.schema import Config, EngineName
from hpcm_scale.training.gathering import Gathered

FP32 = 4
"""Bytes of a weight or gradient; they travel as they are kept."""
_BACKWARD = 2 / 3
"""Share of a step's computing that is backward, recomputation left aside."""


class Times(NamedTuple):
    """Seconds of an optimizer step."""

    compute: float
    communication: float
    overlapped: float
    """The whole step, where communication hides behind as much computing as the engine lets it."""

    @property
    def in_turn(self) -> float:
        """The whole step, where nothing hides."""
        return self.compute + self.communication

    @property
    def efficiency(self) -> float:
        """Speed per process against one process alone with as many images."""
        return self.compute / self.overlapped


class Traffic(NamedTuple):
    """Bytes that a process sends, and receives, per optimizer step."""

    gradients: float
    weights: float
    hiding: float
    """Share of the computing behind which gradients can hide: that of the backward passes that send some."""
    weights_hide: bool
    """Whether weights travel while there is computing (ZeRO-3), or between two steps."""

    def times(self, compute: float, bandwidth: float) -> Times:
        """At `compute` seconds of computing per step and `bandwidth` bytes/s per process, in one direction.

        Latencies are left out, so that many small messages between many processes take longer than this.
        """
        gradients, weights = self.gradients / bandwidth, self.weights / bandwidth
        if self.weights_hide:
            overlapped = max(compute, gradients + weights)
        else:
            overlapped = compute + max(0.0, gradients - self.hiding * compute) + weights
        return Times(compute, gradients + weights, overlapped)


def traffic(config: Config, world_size: int, parameters: int, gathered: Gathered | None) -> Traffic:
    """Traffic of a model of so many `parameters`, of which ZeRO-3, and only it, gathers what is `gathered`."""
    passes = accumulation(config, world_size)
    share = (world_size - 1) / world_size
    whole = FP32 * parameters * share
    if config.engine.name == EngineName.accelerate:  # DDP adds up during the last backward pass
        return Traffic(2 * whole, 0.0, _BACKWARD / passes, weights_hide=False)
    if config.engine.zero_stage == 0:  # once, when all is computed
        return Traffic(2 * whole, 0.0, 0.0, weights_hide=False)
    if config.engine.zero_stage == 1:  # during the last backward pass
        return Traffic(2 * whole, whole, _BACKWARD / passes, weights_hide=False)
    if config.engine.zero_stage == 2:  # during every backward pass; here, too, DeepSpeed all-reduces
        return Traffic(2 * whole * passes, whole, _BACKWARD, weights_hide=False)
    weights = FP32 * share * (gathered.always + passes * gathered.elements)
    return Traffic(whole * passes, weights, 1.0, weights_hide=True)
