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
from hpcm_scale.model.shapes import on_meta, parameter_count
from hpcm_scale.training.costs import training_flops_per_image
from hpcm_scale.training.gathering import Gathered, Limits, gather
from hpcm_scale.training.pieces import KINDS
from hpcm_scale.training.rehearsal import rehearse
from hpcm_scale.training.traffic import FP32, Times, Traffic, traffic

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
            engine.checkpoint,
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
