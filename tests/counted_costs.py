"""Imported by the fork server: counts the FLOPs of what tests train, which each of its processes would count again."""

from __future__ import annotations

from small_training import SMALL

from hpcm_scale.config.compose import compose
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.training.costs import costs_by_phase

for overrides in (SMALL, ("model=nano",)):
    config = compose(overrides)
    costs_by_phase(RunSpec.of(config, 1).phases, config.model, config.machine, config.optimizer)
