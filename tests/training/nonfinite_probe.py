"""Run under the launcher: one process has a NaN loss; what does the engine do on all of them?"""

from __future__ import annotations

import sys

import torch
from torch import nn

from hpcm_scale.config.compose import compose
from hpcm_scale.training import processes
from hpcm_scale.training.engine import create_engine


def main() -> None:
    arguments = processes.without_launcher_arguments(sys.argv[1:])
    config = compose([*arguments, "train.batch_size=2"])
    processes.complete_environment()
    engine = create_engine(config)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    engine.prepare(model)

    def step(bad: bool):
        loss = engine.module(torch.ones(1, 4, device=engine.device)).square().mean()
        engine.backward(loss * (float("nan") if bad and engine.rank == 1 else 1.0))
        return engine.step(0.1)

    report = [step(bad=False).skipped]
    before = engine.weights()
    report.append(step(bad=True).skipped)
    after = engine.weights()
    report.append(step(bad=False).skipped)
    last = engine.weights()
    if engine.rank == 0:
        report.append(all(torch.equal(before[name], after[name]) for name in before))
        report.append(all(bool(tensor.isfinite().all()) for tensor in last.values()))
        report.append(any(not torch.equal(after[name], last[name]) for name in after))
    print(f"RANK {engine.rank} {report}", flush=True)
    engine.reduce(torch.zeros(1))


main()
