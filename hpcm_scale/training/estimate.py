"""Estimate of a run without running it: memory per process, FLOPs, communication, time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from hpcm_scale.compute.tracker import PETA
from hpcm_scale.config.schema import EngineConfig, EngineName, ModelConfig, OptimizerConfig
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.model.parameters import on_meta, parameter_count
from hpcm_scale.training.costs import training_flops_per_image
from hpcm_scale.training.dry_run import GatherCost, dry_run, gather_cost
from hpcm_scale.training.matrix_optimizers import Cost, cost

# Communication model: bytes per optimizer step, and how much of their time overlaps with compute.
#
# Ring algorithms over n processes: a reduce-scatter or all-gather of b bytes sends b·(n − 1)/n per process, an
# all-reduce twice that. Verified against the traffic of two processes with DeepSpeed 0.19.8 and with accelerate's DDP.


FP32 = 4
"""Bytes of a weight or gradient; they are sent as fp32."""
_BACKWARD = 2 / 3
"""Fraction of a step's compute that is backward, without recomputation."""


class Times(NamedTuple):
    """Seconds of an optimizer step."""

    compute: float
    communication: float
    overlapped: float
    """The whole step, with as much overlap as the engine allows."""

    @property
    def sequential(self) -> float:
        """The whole step without overlap."""
        return self.compute + self.communication

    @property
    def efficiency(self) -> float:
        """Speed per process, relative to a single process with the same images."""
        return self.compute / self.overlapped


class Communication(NamedTuple):
    """Bytes that a process sends, and receives, per optimizer step."""

    gradients: float
    weights: float
    overlap: float
    """Fraction of the compute that gradients can overlap with: the backward passes that send some."""
    weights_overlap: bool
    """Whether weights are sent during compute (ZeRO-3) or between two steps."""
    matrices: float = 0.0
    """Bytes of gradients sent to the owners of matrices, and of updates back, between two steps (Muon, SOAP)."""

    def times(self, compute: float, bandwidth: float) -> Times:
        """With `compute` seconds per step and `bandwidth` bytes/s per process, in one direction.

        Without latencies: many small messages between many processes take longer.
        """
        gradients, weights, matrices = (sent / bandwidth for sent in (self.gradients, self.weights, self.matrices))
        if self.weights_overlap:
            overlapped = max(compute, gradients + weights)
        else:
            overlapped = compute + max(0.0, gradients - self.overlap * compute) + weights
        return Times(compute, gradients + weights + matrices, overlapped + matrices)


def communication(
    engine: EngineConfig, spec: RunSpec, parameters: int, gathered: GatherCost | None, exchanged: float = 0.0
) -> Communication:
    """Communication of a model with so many `parameters`.

    `gathered`: of ZeRO-3, None for other stages; `exchanged`: elements of matrices that the optimizer sends each way.
    """
    passes = spec.accumulation
    share = (spec.world_size - 1) / spec.world_size
    whole = FP32 * parameters * share
    if engine.name == EngineName.accelerate:  # DDP reduces during the last backward pass
        return Communication(2 * whole, 0.0, _BACKWARD / passes, weights_overlap=False)
    if engine.zero_stage == 0:  # once, after all backward passes
        return Communication(2 * whole, 0.0, 0.0, weights_overlap=False)
    matrices = 2 * FP32 * exchanged
    if engine.zero_stage == 1:  # during the last backward pass
        return Communication(2 * whole, whole, _BACKWARD / passes, weights_overlap=False, matrices=matrices)
    if engine.zero_stage == 2:  # during every backward pass; DeepSpeed all-reduces here, too
        return Communication(2 * whole * passes, whole, _BACKWARD, weights_overlap=False, matrices=matrices)
    assert gathered is not None
    weights = FP32 * share * (gathered.always + passes * gathered.elements)
    return Communication(whole * passes, weights, 1.0, weights_overlap=True, matrices=matrices)


@dataclass(frozen=True)
class Memory:
    """Bytes per process at the peak of a training step."""

    weights: int
    """With ZeRO-3: this process's share, the gathered layers, and small tensors that are not sharded."""
    gradients: int
    optimizer: int
    """Its state, and ZeRO's fp32 master copy of this process's share; with Muon and SOAP, of the process with most."""
    averages: int
    """Moving averages of the weights (train.ema) of this process's share."""
    activations: int
    """Of one micro-batch: saved for the backward pass, with the bf16 copy of the weights, and temporary at the peak; in
    the crop phase that needs most."""
    buffers: int
    """Buckets for the reduction of gradients."""
    host: int
    """Part of the above in host memory instead (offload); not part of `device`."""

    @property
    def device(self) -> int:
        """Total on the device."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.activations + self.buffers


class PhaseCost(NamedTuple):
    """Costs of all steps with crops of one size."""

    flops: int
    """Model FLOPs of all processes, with those of the optimizer."""
    launches: int
    """Operations that the host of each process launches."""


@dataclass(frozen=True)
class Estimate:
    """Estimate of a run."""

    parameters: int
    memory: Memory
    communication: Communication
    averages: int
    """Moving averages of the weights."""
    building: int
    """Peak bytes of weights in the host memory of a process while the model is built: the largest layer with ZeRO-3,
    else the whole model."""
    images: int
    flops_per_step: int
    """Of one process, in the crop phase that needs most, with those of the optimizer."""
    launches_per_step: int
    """Operations launched eagerly in forward and backward passes, in the crop phase that needs most."""
    phases: list[PhaseCost]
    """In order."""
    checkpoint: int
    """Bytes of one checkpoint; from the first one on each process keeps a copy of its share in host memory."""

    @property
    def flops(self) -> int:
        """Model FLOPs of the whole run."""
        return sum(part.flops for part in self.phases)

    @property
    def pflops(self) -> float:
        """Model PFLOPs of the whole run."""
        return self.flops / PETA

    def seconds(self, peak: float, mfu: float, launch: float = 0.0) -> float:
        """Time of the run at `peak` FLOP/s of all processes together and an MFU of `mfu` (0 to 1).

        A step takes the longer of its compute and the launches of its operations at `launch` seconds each.
        """
        return sum(max(part.flops / (peak * mfu), part.launches * launch) for part in self.phases)

    def times(self, peak: float, mfu: float, bandwidth: float, launch: float = 0.0) -> Times:
        """Of a step, with `mfu` × `peak` FLOP/s and `bandwidth` bytes/s of each process; `launch` as in `seconds`."""
        computing = max(self.flops_per_step / (peak * mfu), self.launches_per_step * launch)
        return self.communication.times(computing, bandwidth)


def estimate(
    spec: RunSpec, config: ModelConfig, engine: EngineConfig, optimizer: OptimizerConfig, averages: int
) -> Estimate:
    """Estimate a run of a model with `averages` moving averages of its weights, one device per process.

    Memory follows ZeRO (arXiv 1910.02054, section 3): fp32 weights, gradients and optimizer state, each replicated or
    sharded by stage; verified against the tensors of DeepSpeed 0.19.8's engine. Fragmentation and temporary memory of
    kernels and of the communication library come on top, usually 10 to 20 %.
    """
    model = on_meta(config)
    parameters = parameter_count(model)
    sharded = engine.name == EngineName.deepspeed and engine.zero_stage > 0
    update = cost(model, optimizer, spec.world_size if sharded else 1)
    precision, checkpointing = engine.precision, engine.activation_checkpointing
    dry_runs = [
        dry_run(config, precision, checkpointing, phase.crop, phase.micro_batch_size, True) for phase in spec.phases
    ]
    activations = max(run.activations for run in dry_runs)
    steps = [phase.last_step - phase.first_step for phase in spec.phases]
    flops = [training_flops_per_image(model, phase.crop) * phase.batch_size for phase in spec.phases]
    launches = [spec.accumulation * run.launches for run in dry_runs]
    zero_3 = engine.zero_stage == 3
    gathered = gather_cost(dry_runs[0].uses, spec.deepspeed["zero_optimization"]) if zero_3 else None
    return Estimate(
        parameters=parameters,
        memory=_memory(engine, spec, averages, parameters, update, activations, gathered),
        communication=communication(engine, spec, parameters, gathered, update.exchanged),
        averages=averages,
        building=FP32 * (_largest_layer(model) if zero_3 else parameters),
        images=spec.images,
        flops_per_step=update.flops_per_rank + max(flops) // spec.world_size,
        launches_per_step=max(launches),
        phases=[
            PhaseCost(count * (per_step + update.flops), count * launched)
            for count, per_step, launched in zip(steps, flops, launches, strict=True)
        ],
        checkpoint=checkpoint_bytes(model, optimizer, averages),
    )


def checkpoint_bytes(model: nn.Module, optimizer: OptimizerConfig, averages: int) -> int:
    """Bytes of a checkpoint of a model, also on meta or sharded by ZeRO-3, with so many moving averages."""
    return FP32 * ((1 + averages) * parameter_count(model) + cost(model, optimizer).state)


def launch_seconds(compiled: bool, launch_us: float) -> float:
    """Seconds per launch for `Estimate.seconds` and `times`; 0 if `compiled`, where their number is unknown."""
    return 0.0 if compiled else 1e-6 * launch_us


def _largest_layer(model: nn.Module) -> int:
    """Most parameters of a module, without those of its submodules."""
    return max(sum(parameter.numel() for parameter in layer.parameters(recurse=False)) for layer in model.modules())


def _memory(
    engine: EngineConfig,
    spec: RunSpec,
    averages: int,
    parameters: int,
    update: Cost,
    activations: int,
    gathered: GatherCost | None,
) -> Memory:
    world_size, stage = spec.world_size, engine.zero_stage if engine.name == EngineName.deepspeed else 0

    def share(from_stage: int) -> int:
        return -(-parameters // world_size) if stage >= from_stage else parameters

    weights, gradients = FP32 * share(3), FP32 * share(2)
    whole = FP32 * (gathered.most + gathered.always) if gathered else 0
    # Stages 1 and 2 update an fp32 copy of this process's share; stage 3 only with offload.
    master = FP32 * share(1) if stage in (1, 2) or engine.offload else 0
    optimizer = FP32 * update.state_per_rank + master
    averages = FP32 * share(1) * averages
    # Two alternating buffers at stages 1 and 2, one at stage 3; DDP copies every gradient into its buckets.
    buffers = FP32 * spec.deepspeed["zero_optimization"]["reduce_bucket_size"] * (0, 2, 2, 1)[stage]
    if engine.name == EngineName.accelerate and world_size > 1:
        buffers = FP32 * parameters
    if not engine.offload:
        return Memory(weights + whole, gradients, optimizer, averages, activations, buffers, host=0)
    return Memory(whole, 0, 0, 0, activations, buffers, host=weights + gradients + optimizer + averages)
