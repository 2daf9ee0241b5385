"""Engines: DeepSpeed and accelerate behind one interface."""

from __future__ import annotations

from hpcm_scale.config.schema import Config, EngineName
from hpcm_scale.training.engines.base import Engine


def create_engine(config: Config) -> Engine:
    """The engine that the configuration names; joins the process group."""
    # The two libraries are slow to import and each brings its own logging: load only the one in use.
    if config.engine.name == EngineName.deepspeed:
        from hpcm_scale.training.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config)
    from hpcm_scale.training.engines.accelerate import AccelerateEngine

    return AccelerateEngine(config)
