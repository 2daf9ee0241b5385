"""Does training end at the same loss in bf16, compiled, as in fp32? Real runs, the same seeds and photos.

    python benchmarks/same_loss.py --shards SHARDS --images FOLDER [--model nano] [--steps 500] [--seeds 0 1 2]

For every seed the model is trained twice, with the paper's learning rates: in fp32, and in bf16 with compiled
regions. Printed: the evaluation losses at the end, and how far apart they are. Runs that are there are not repeated.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from bench.machine import machine
from bench.report import Report, Table, tell

from hpcm_scale.tracking.journal import read_journal
from hpcm_scale.tracking.progress import progress

WAYS = {"fp32": ["engine.precision=fp32"], "bf16, compiled": ["engine.precision=bf16", "engine.compile=true"]}
"""What is compared: overrides by name."""


def main() -> None:
    """Train what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", required=True, type=Path)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/same_loss"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    losses = {way: [] for way in WAYS}
    for seed, way in progress(list(product(arguments.seeds, WAYS)), description="runs", unit="run"):
        losses[way].append(trained(arguments, way, seed))
    report = compared(arguments, losses)
    tell(report, arguments.out)


def trained(arguments: argparse.Namespace, way: str, seed: int) -> float:
    """The evaluation loss at the end of one run."""
    run = arguments.runs / f"{arguments.model}_{arguments.steps}" / f"{WAYS[way][0].partition('=')[2]}_{seed}"
    command = [sys.executable, "-m", "hpcm_scale.train", f"model={arguments.model}", "engine=accelerate"]
    command += ["train.batch_size=8", *WAYS[way], f"train.seed={seed}", f"train.steps={arguments.steps}"]
    command += [f"data.shards={arguments.shards}", f"eval.images={arguments.images}", "log.wandb=disabled"]
    command += [f"eval.every={arguments.steps}", f"run.dir={run}", f"train.checkpoint_every={arguments.steps}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return read_journal(run / "metrics.jsonl")[-1]["eval/loss"]


def compared(arguments: argparse.Namespace, losses: dict[str, list[float]]) -> Report:
    """Table and numbers."""
    plain, fast = losses.values()
    rows = [
        [str(seed), *(f"{loss[index]:.4f}" for loss in (plain, fast)), f"{fast[index] / plain[index] - 1:+.3%}"]
        for index, seed in enumerate(arguments.seeds)
    ]
    rows.append(["mean", f"{mean(plain):.4f}", f"{mean(fast):.4f}", f"{mean(fast) / mean(plain) - 1:+.3%}"])
    notes = [f"Over seeds, fp32 varies by {stdev(plain) / mean(plain):.2%} (standard deviation)."] if rows[2:] else []
    title = f"Evaluation loss of {arguments.model} after {arguments.steps} steps of 8 crops"
    return Report(
        name="same_loss",
        title=title,
        machine=machine(torch.device("cpu"), ("python", "benchmarks/same_loss.py")),
        tables=[Table(title="", headings=["seed", *WAYS, "difference"], rows=rows, notes=notes)],
        results={"seeds": arguments.seeds, "losses": losses},
    )


if __name__ == "__main__":
    main()
