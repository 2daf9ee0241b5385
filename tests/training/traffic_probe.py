"""Run under a launcher: what collective operations carry in one training step of several configurations.

The argument is a JSON list of lists of overrides; for each, one JSON line with bytes by operation.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpcm_scale.config.compose import compose
from hpcm_scale.config.schema import Config
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.distributed.processes import complete_environment, world_size
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.objective import rate_distortion_loss
from hpcm_scale.training.engines import create_engine
from hpcm_scale.training.task import image_noise

UNTIL_THE_ORDER_IS_KNOWN = 2
"""Steps of ZeRO-3."""


class Collectives(TorchDispatchMode):
    """Bytes of the largest tensor of every collective operation: what is reduced, or gathered in all."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.bytes[func._opname] += max(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


def count(config: Config) -> None:
    spec = RunSpec.of(config, world_size())
    engine = create_engine(config.engine, config.train, config.optimizer, spec)
    torch.manual_seed(0)
    model = HPCM(
        config.model, precision=config.engine.precision, activation_checkpointing=config.engine.activation_checkpointing
    )
    engine.prepare(model)
    images = spec.micro_batch_size

    def step() -> None:
        for _ in range(spec.accumulation):
            x = torch.rand(images, 3, config.data.crop, config.data.crop).to(memory_format=torch.channels_last)
            coded = engine.module(x, image_noise(model, x, torch.arange(images), seed=0))
            engine.backward(rate_distortion_loss(x, coded.x_hat, coded.bits_y, coded.bits_z, 0.013).mean().loss)
        engine.step(1e-5, float(engine.clip()))

    for _ in range(UNTIL_THE_ORDER_IS_KNOWN if config.engine.zero_stage == 3 else 0):
        step()
    with Collectives() as collectives:
        step()
    if engine.rank == 0:
        os.write(1, (json.dumps(collectives.bytes) + "\n").encode())
    engine.close()


def main() -> None:
    complete_environment()
    [configurations] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    for overrides in json.loads(configurations):
        count(compose(overrides))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
