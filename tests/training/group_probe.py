"""Run under a launcher: do the engines keep the process group and the number of threads, and what is the group like?"""

from __future__ import annotations

import atexit
import os
import time

import deepspeed.ops
import torch
import torch.distributed
from deepspeed.utils import groups

from hpcm_scale.config.compose import compose, to_dict
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.distributed.processes import world_size
from hpcm_scale.distributed.rendezvous import facts, init_process_group, join
from hpcm_scale.training.engines import create_engine


def main() -> None:
    rank = int(os.environ["RANK"])
    end = lambda: say(f"group {rank} at the end: {torch.distributed.is_initialized()}")  # noqa: E731
    atexit.register(end)  # registered first, it is called last
    deepspeed.ops._probe_compatible_ops = refuse
    torch.set_num_threads(1)
    for name in ("accelerate", "deepspeed"):
        config = compose([f"engine.name={name}", "engine.zero_stage=0", "train.batch_size=4"])
        group = join(facts(to_dict(config), "digest"), minutes=1)
        init_process_group(group, watchdog_timeout=90)
        before = torch.distributed.group.WORLD
        engine = create_engine(config.engine, config.train, config.optimizer, RunSpec.of(config, world_size()))
        same = "same" if torch.distributed.group.WORLD is before else "another"
        say(f"group {name} {engine.rank} of {engine.world_size}: {same}, threads: {torch.get_num_threads()}")
    made = [torch.distributed.group.WORLD, torch.distributed.new_group(), groups._get_data_parallel_group()]
    limits = [each._get_backend(torch.device("cpu")).options._timeout for each in made]
    limits.append(torch.distributed.distributed_c10d._get_default_store().timeout)
    say(f"group {rank} waits: {[limit.total_seconds() / 60 for limit in limits]}")
    time.sleep(rank)  # process 0, which keeps the store, would be the first to end


def refuse() -> None:
    raise AssertionError("DeepSpeed looks for what it could compile")


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


if __name__ == "__main__":
    main()
