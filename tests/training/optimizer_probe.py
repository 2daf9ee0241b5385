"""Run under a launcher: trainings of a tiny model with several engines, each of which continues the state of another.

The argument is a JSON list of lists of overrides; for each, one JSON line with losses from rank 0.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed

from hpcm_scale.config.compose import compose
from hpcm_scale.config.schema import Config
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.distributed.processes import complete_environment, world_size
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.parameters import parametrise
from hpcm_scale.objective import rate_distortion_loss
from hpcm_scale.training.engines import create_engine
from hpcm_scale.training.engines.base import Engine
from hpcm_scale.training.state_shards import load, write
from hpcm_scale.training.task import image_noise

RATE = 3e-4
"""Low, so that rounding errors seldom decide how an element of y is rounded."""
CONTINUED = 4
"""Steps."""


def train(config: Config, before: list[Path], save: Path) -> dict[str, list[float]]:
    """Losses of all steps, with the state saved half-way; then of some steps from the state `before`."""
    half, steps = config.train.steps // 2, config.train.steps
    engine = create_engine(config.engine, config.train, config.optimizer, RunSpec.of(config, world_size()))
    torch.manual_seed(0)
    with engine.building():
        model = HPCM(config.model)
        parametrise(model)
    engine.prepare(model)
    whole = [take_step(engine, model, config, step) for step in range(half)]
    write(save, {shard.key: shard.values.clone() for shard in engine.state_shards()})
    whole += [take_step(engine, model, config, step) for step in range(half, steps)]
    assert engine.updates == steps
    engine.barrier()
    load(before or [save], engine.state_shards())
    engine.load_master_weights(half)
    continued = [take_step(engine, model, config, step) for step in range(half, half + CONTINUED)]
    engine.close()
    return {"whole": whole, "continued": continued}


def take_step(engine: Engine, model: HPCM, config: Config, step: int) -> float:
    side, index = config.data.crop, engine.rank + step * engine.world_size
    generator = torch.Generator().manual_seed(index)
    ramp = torch.rand(1, 3, 1, side, generator=generator) * torch.rand(1, 3, side, 1, generator=generator)
    x = ramp.to(memory_format=torch.channels_last)
    coded = engine.module(x, image_noise(model, x, torch.tensor([index]), seed=0))
    loss = rate_distortion_loss(x, *coded, 0.013).mean().loss
    engine.backward(loss)
    engine.step(RATE, float(engine.clip()))
    return float(engine.reduce(loss.detach()[None].double())) / engine.world_size


def main() -> None:
    complete_environment()
    [configurations] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    rank, before = int(os.environ["RANK"]), []
    for number, overrides in enumerate(json.loads(configurations)):
        config = compose(overrides)
        found = train(config, before, Path(f"{number}.{rank}"))
        ranks = range(world_size() if config.engine.zero_stage else 1)
        before = [Path(f"{number}.{each}") for each in ranks]
        if rank == 0:
            os.write(1, (json.dumps(found) + "\n").encode())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
