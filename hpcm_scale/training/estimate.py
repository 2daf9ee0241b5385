"""What a run will need, without running it: memory per process, FLOPs, time."""

from __future__ import annotations

from dataclasses import dataclass

from hpcm_scale.compute.tracker import PETA
from hpcm_scale.config.checks import micro_batch_size
from hpcm_scale.config.deepspeed import LIVE_PARAMETERS, REDUCED_PARAMETERS
from hpcm_scale.config.schema import Config, EngineName
from hpcm_scale.model.shapes import on_meta, parameter_count
from hpcm_scale.training.costs import activation_bytes, training_flops_per_image
from hpcm_scale.training.pieces import KINDS

_FP32 = 4
_ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes per process at the peak of a training step."""

    weights: int
    """With ZeRO-3 this process's share and the layers gathered at a time."""
    gradients: int
    optimizer: int
    """Adam's two moments, and ZeRO's fp32 master copy of this process's share."""
    activations: int
    """Kept for the backward pass by one micro-batch; nothing is recomputed."""
    buffers: int
    """Where gradients are laid out to be added up over the processes."""
    host: int
    """Of these kinds, what lies in host memory instead (offload); not part of the sum."""

    @property
    def device(self) -> int:
        """All together on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True)
class Estimate:
    """A run's needs."""

    parameters: int
    memory: Memory
    flops_per_image: int
    images: int

    @property
    def pflops(self) -> float:
        """Model PFLOPs of the whole run."""
        return self.flops_per_image * self.images / PETA

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint; each process keeps its share in host memory from the first one on."""
        return _FP32 * len(KINDS) * self.parameters

    def seconds(self, peak: float, mfu: float) -> float:
        """Time of the run on processes with `peak` FLOP/s together, of which `mfu` (0 to 1) are used."""
        return self.flops_per_image * self.images / (peak * mfu)


def estimate(config: Config, world_size: int) -> Estimate:
    """Estimate a checked configuration on `world_size` processes, one device each.

    Memory follows ZeRO (arXiv 1910.02054, section 3): fp32 weights, gradients and Adam moments, each
    whole or divided over the processes by stage; checked against the tensors of DeepSpeed 0.19.8's engine.
    Fragmentation and temporary memory of kernels and of the communication library come on top; 10 to 20 %
    is usual.
    """
    model = on_meta(config.model)
    parameters = parameter_count(model)
    activations = activation_bytes(
        config.model, config.engine.precision, config.data.crop, micro_batch_size(config, world_size)
    )
    return Estimate(
        parameters,
        _memory(config, world_size, parameters, activations),
        training_flops_per_image(model, config.data.crop),
        config.train.steps * config.train.batch_size,
    )


def _memory(config: Config, world_size: int, parameters: int, activations: int) -> Memory:
    stage = config.engine.zero_stage if config.engine.name == EngineName.deepspeed else 0

    def share(from_stage: int) -> int:
        return -(-parameters // world_size) if stage >= from_stage else parameters

    weights, gradients = _FP32 * share(3), _FP32 * share(2)
    gathered = _FP32 * min(parameters, LIVE_PARAMETERS) if stage == 3 else 0  # what is fetched ahead included
    # Stages 1 and 2 update a copy of this process's share, and so does stage 3 when the host updates it.
    master = _FP32 * share(1) if stage in (1, 2) or config.engine.offload else 0
    optimizer = _ADAM_MOMENTS * _FP32 * share(1) + master
    # Two buffers in turns at stages 1 and 2, one at stage 3; accelerate's DDP copies every gradient into its buckets.
    buffers = _FP32 * REDUCED_PARAMETERS * (0, 2, 2, 1)[stage]
    if config.engine.name == EngineName.accelerate and world_size > 1:
        buffers = _FP32 * parameters
    if not config.engine.offload:
        return Memory(weights + gathered, gradients, optimizer, activations, buffers, host=0)
    return Memory(gathered, 0, 0, activations, buffers, host=weights + gradients + optimizer)
