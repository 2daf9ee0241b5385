"""Run under a launcher: do the engines use the process group that was initialised for them?"""

from __future__ import annotations

import os

import torch.distributed

from hpcm_scale.config.compose import compose
from hpcm_scale.training.engine import create_engine
from hpcm_scale.training.group.differences import facts
from hpcm_scale.training.group.rendezvous import initialise, join


def main() -> None:
    for name in ("accelerate", "deepspeed"):
        config = compose([f"engine.name={name}", "engine.zero_stage=0", "train.batch_size=4"])
        group = join(facts(config, "digest"), minutes=1)
        initialise(group, stall_minutes=1)
        before = torch.distributed.group.WORLD
        engine = create_engine(config)
        same = "same" if torch.distributed.group.WORLD is before else "another"
        os.write(1, f"group {name} {engine.rank} of {engine.world_size}: {same}\n".encode())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
