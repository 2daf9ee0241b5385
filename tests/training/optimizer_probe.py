"""Run under a launcher: trainings of a tiny model with several engines, each of which continues the state of another.

The argument is a JSON list of lists of overrides. For each, one JSON line with the losses of all steps from rank 0, and
those of the second half of a training that begins with the state that the engine before has left half-way.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed
from safetensors.torch import load_file

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

RATE = 2e-3


def train(config: Config, resume: list[Path], save: Path | None) -> list[float]:
    """The mean losses of all steps, or of those after the state in `resume`; saves the state half-way."""
    steps = config.train.steps
    engine = create_engine(config.engine, config.train, config.optimizer, RunSpec.of(config, world_size()))
    torch.manual_seed(0)
    with engine.building():
        model = HPCM(config.model)
        parametrise(model)
    engine.prepare(model)
    first = 0
    if resume:
        first = steps // 2
        load(resume, engine.state_shards())
        engine.load_master_weights(first)
    losses = []
    for step in range(first, steps):
        if step == steps // 2 and save:
            write(save, {shard.key: shard.values.clone() for shard in engine.state_shards()})
        losses.append(take_step(engine, model, config, step))
    assert engine.updates == steps
    engine.close()
    return losses


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
        found = {"whole": train(config, [], Path(f"{number}.{rank}"))}
        torch.distributed.barrier()
        if before:
            found["resumed"] = train(config, before, None)
        before = [Path(f"{number}.{each}") for each in range(world_size())]
        if config.engine.zero_stage == 0:
            before = before[:1]
        if rank == 0:
            found["state"] = sorted({key.split("/")[0] for key in load_file(before[0])})
            os.write(1, (json.dumps(found) + "\n").encode())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
