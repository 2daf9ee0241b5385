"""Run under the launcher: one process has a NaN loss; what does the engine do on all of them?"""

from __future__ import annotations

import sys

import torch
from torch import nn

from hpcm_scale.config.compose import compose
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.distributed import processes
from hpcm_scale.training.engines import create_engine


def main() -> None:
    processes.complete_environment()
    for name in processes.without_launcher_arguments(sys.argv[1:]):
        probe(name)


def probe(name: str) -> None:
    config = compose([f"engine={name}", "train.batch_size=2"])
    spec = RunSpec.of(config, processes.world_size())
    engine = create_engine(config.engine, config.train, config.optimizer, spec)
    torch.manual_seed(0)
    engine.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))

    def step(bad: bool) -> bool:
        loss = engine.module(torch.ones(1, 4, device=engine.device)).square().mean()
        engine.backward(loss * (float("nan") if bad and engine.rank == 1 else 1.0))
        return engine.step(0.1, float(engine.clip())).skipped

    skipped = [step(bad=False)]
    before = engine.weights()
    skipped.append(step(bad=True))
    after = engine.weights()
    skipped.append(step(bad=False))
    last = engine.weights()
    report = [name, engine.rank, *skipped]
    if engine.rank == 0:
        report.append(all(torch.equal(before[key], after[key]) for key in before))
        report.append(all(bool(tensor.isfinite().all()) for tensor in last.values()))
        report.append(any(not torch.equal(after[key], last[key]) for key in after))
    sys.stdout.write(" ".join(map(str, report)) + "\n")  # at once: two processes share the pipe
    sys.stdout.flush()
    engine.barrier()
    engine.close()


main()
