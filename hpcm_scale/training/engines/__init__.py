"""Engines: DeepSpeed and accelerate behind one interface."""

from __future__ import annotations

from hpcm_scale.config.schema import EngineConfig, EngineName, OptimizerConfig, TrainConfig
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.training.engines.base import Engine


def create_engine(engine: EngineConfig, train: TrainConfig, optimizer: OptimizerConfig, spec: RunSpec) -> Engine:
    """Create the engine that the configuration names."""
    # Both libraries are slow to import and set up logging: import only the one in use.
    if engine.name == EngineName.deepspeed:
        from hpcm_scale.training.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(engine, optimizer, spec.deepspeed, train.clip_norm)
    from hpcm_scale.training.engines.accelerate import AccelerateEngine

    return AccelerateEngine(optimizer, spec.accumulation, train.clip_norm)
