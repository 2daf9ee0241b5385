"""What a run will need, without running it: memory per process, FLOPs, communication, time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from hpcm_scale.compute.tracker import PETA
from hpcm_scale.config.checks import accumulation, micro_batch_size
from hpcm_scale.config.deepspeed import deepspeed_dictionary
from hpcm_scale.config.phases import Phase, images_at, phases
from hpcm_scale.config.schema import Config, EngineName
from hpcm_scale.model.parameters import on_meta, parameter_count
from hpcm_scale.training.costs import training_flops_per_image
from hpcm_scale.training.dry_run import Gathered, Limits, gather, rehearse
from hpcm_scale.training.state_shards import KINDS

# What the processes of a run send each other, and how much of the time for it hides behind computing.
#
# Ring algorithms over n processes: to reduce-scatter or all-gather b bytes each process sends b·(n − 1)/n, to
# all-reduce them twice that. Checked against what two processes send with DeepSpeed 0.19.8 and with accelerate's DDP.


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


_ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes per process at the peak of a training step."""

    weights: int
    """With ZeRO-3 this process's share, the layers gathered at a time, and small tensors that are kept whole."""
    gradients: int
    optimizer: int
    """Adam's two moments, and ZeRO's fp32 master copy of this process's share."""
    averages: int
    """Moving averages of the weights (train.ema) of this process's share."""
    activations: int
    """Of one micro-batch: what is kept for the backward pass, the bf16 copy of the weights included, and what is being
    computed at the peak; of the phases of crops, the one that takes most."""
    buffers: int
    """Where gradients are laid out to be added up over the processes."""
    host: int
    """Of these kinds, what lies in host memory instead (offload); not part of the sum."""

    @property
    def device(self) -> int:
        """All together on the device."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.activations + self.buffers


class Stretch(NamedTuple):
    """Optimizer steps with crops of one size: what they cost together."""

    steps: int
    flops: int
    """Model FLOPs of all processes."""
    launches: int
    """Operations that the host of each process launches."""


@dataclass(frozen=True)
class Estimate:
    """A run's needs."""

    parameters: int
    memory: Memory
    traffic: Traffic
    averages: int
    """Moving averages of the weights."""
    building: int
    """Most bytes of weights that a process holds in host memory while the model is made: those of the largest layer
    with ZeRO-3, of the whole model without."""
    images: int
    flops_per_step: int
    """Of one process; of the phases of crops, in the one that takes most."""
    launches_per_step: int
    """The same, of operations launched eagerly in forward and backward passes."""
    stretches: list[Stretch]
    """By phase of crops."""

    @property
    def flops(self) -> int:
        """Model FLOPs of the whole run."""
        return sum(part.flops for part in self.stretches)

    @property
    def pflops(self) -> float:
        """Model PFLOPs of the whole run."""
        return self.flops / PETA

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint; each process keeps its share in host memory from the first one on."""
        return checkpoint_bytes(self.parameters, self.averages)

    def seconds(self, peak: float, mfu: float, launch: float = 0.0) -> float:
        """Time of the run on processes with `peak` FLOP/s together, of which `mfu` (0 to 1) are used.

        A step takes as long as its computing, or as its host takes to launch all operations at `launch` seconds each.
        """
        return sum(max(part.flops / (peak * mfu), part.launches * launch) for part in self.stretches)

    def times(self, peak: float, mfu: float, bandwidth: float, launch: float = 0.0) -> Times:
        """Of a step whose processes compute at `mfu` × `peak` FLOP/s each and send at `bandwidth` bytes/s each.

        `launch`: see `seconds`; what the host adds counts as computing, behind which communication can hide.
        """
        computing = max(self.flops_per_step / (peak * mfu), self.launches_per_step * launch)
        return self.traffic.times(computing, bandwidth)


def estimate(config: Config, world_size: int) -> Estimate:
    """Estimate a checked configuration on `world_size` processes, one device each.

    Memory follows ZeRO (arXiv 1910.02054, section 3): fp32 weights, gradients and Adam moments, each
    whole or divided over the processes by stage; checked against the tensors of DeepSpeed 0.19.8's engine.
    Fragmentation and temporary memory of kernels and of the communication library come on top; 10 to 20 %
    is usual.
    """
    model = on_meta(config.model)
    parameters = parameter_count(model)
    engine, planned = config.engine, phases(config)
    rehearsals = [
        rehearse(
            config.model,
            engine.precision,
            engine.activation_checkpointing,
            phase.crop,
            micro_batch_size(config, world_size, phase),
            True,
        )
        for phase in planned
    ]
    activations, uses = max(rehearsal.activations for rehearsal in rehearsals), rehearsals[0].uses
    costs = {phase.first_image: training_flops_per_image(model, phase.crop) for phase in planned}
    launches = [accumulation(config, world_size) * rehearsal.launches for rehearsal in rehearsals]
    zero = deepspeed_dictionary(config, world_size)["zero_optimization"]
    gathered = gather(uses, limits(zero)) if engine.zero_stage == 3 else None
    sharded = engine.zero_stage == 3 and not config.machine.freeze_codec  # layer by layer, while it is made
    return Estimate(
        parameters=parameters,
        memory=_memory(config, world_size, parameters, activations, gathered, zero["reduce_bucket_size"]),
        traffic=traffic(config, world_size, parameters, gathered),
        averages=len(config.train.ema),
        building=FP32 * (_largest_layer(model) if sharded else parameters),
        images=images_at(config, config.train.steps),
        flops_per_step=max(costs[phase.first_image] * phase.batch_size // world_size for phase in planned),
        launches_per_step=max(launches),
        stretches=[
            _stretch(phase, costs[phase.first_image], launched)
            for phase, launched in zip(planned, launches, strict=True)
        ],
    )


def checkpoint_bytes(parameters: int, averages: int) -> int:
    """Bytes of a checkpoint of a model with so many parameters and moving averages of its weights."""
    return FP32 * (len(KINDS) + averages) * parameters


def launch_seconds(config: Config, launch_us: float) -> float:
    """Seconds to launch an operation, for `Estimate.seconds` and `times`, from microseconds.

    0 with engine.compile: how many operations a compiled step launches is not known.
    """
    return 0.0 if config.engine.compile else 1e-6 * launch_us


def _largest_layer(model: nn.Module) -> int:
    """Most parameters of a module, those of modules within it left out."""
    return max(sum(parameter.numel() for parameter in layer.parameters(recurse=False)) for layer in model.modules())


def _stretch(phase: Phase, flops_per_image: int, launches_per_step: int) -> Stretch:
    steps = phase.last_step - phase.first_step
    return Stretch(steps, steps * phase.batch_size * flops_per_image, steps * launches_per_step)


def limits(zero: dict[str, Any]) -> Limits:
    """The limits of ZeRO-3 in DeepSpeed's dictionary."""
    return Limits(
        kept=zero["stage3_param_persistence_threshold"],
        reuse=zero["stage3_max_reuse_distance"],
        live=zero["stage3_max_live_parameters"],
        ahead=zero["stage3_prefetch_bucket_size"],
    )


def _memory(
    config: Config, world_size: int, parameters: int, activations: int, gathered: Gathered | None, reduced: int
) -> Memory:
    stage = config.engine.zero_stage if config.engine.name == EngineName.deepspeed else 0

    def share(from_stage: int) -> int:
        return -(-parameters // world_size) if stage >= from_stage else parameters

    weights, gradients = FP32 * share(3), FP32 * share(2)
    whole = FP32 * (gathered.most + gathered.always) if gathered else 0
    # Stages 1 and 2 update a copy of this process's share, and so does stage 3 when the host updates it.
    master = FP32 * share(1) if stage in (1, 2) or config.engine.offload else 0
    optimizer = _ADAM_MOMENTS * FP32 * share(1) + master
    averages = FP32 * share(1) * len(config.train.ema)
    # Two buffers in turns at stages 1 and 2, one at stage 3; accelerate's DDP copies every gradient into its buckets.
    buffers = FP32 * reduced * (0, 2, 2, 1)[stage]
    if config.engine.name == EngineName.accelerate and world_size > 1:
        buffers = FP32 * parameters
    if not config.engine.offload:
        return Memory(weights + whole, gradients, optimizer, averages, activations, buffers, host=0)
    return Memory(whole, 0, 0, 0, activations, buffers, host=weights + gradients + optimizer + averages)
