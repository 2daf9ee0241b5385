"""Final losses of training in fp32 and in compiled bf16, with the same seeds and images.

    python benchmarks/same_loss.py --shards SHARDS --images FOLDER [--model nano] [--steps 500] [--seeds 0 1 2]

For every seed the model is trained twice, with the paper's learning rates: in fp32, and in bf16 with compiled
regions. Printed: the final evaluation losses and their differences. Finished runs are not repeated.
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
from bench.report import Report, Table, publish

from hpcm_scale.tracking.journal import read_journal
from hpcm_scale.tracking.progress import progress

VARIANTS = {"fp32": ["engine.precision=fp32"], "bf16, compiled": ["engine.precision=bf16", "engine.compile=true"]}
"""Overrides of the compared variants, by name."""


def main() -> None:
    """Train the missing runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", required=True, type=Path)
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/same_loss"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    losses = {variant: [] for variant in VARIANTS}
    for seed, variant in progress(list(product(arguments.seeds, VARIANTS)), description="runs", unit="run"):
        losses[variant].append(trained(arguments, variant, seed))
    report = compared(arguments, losses)
    publish(report, arguments.out)


def trained(arguments: argparse.Namespace, variant: str, seed: int) -> float:
    """The final evaluation loss of one run."""
    run = arguments.runs / f"{arguments.model}_{arguments.steps}" / f"{VARIANTS[variant][0].partition('=')[2]}_{seed}"
    command = [sys.executable, "-m", "hpcm_scale.train", f"model={arguments.model}", "engine=accelerate"]
    command += ["train.batch_size=8", *VARIANTS[variant], f"train.seed={seed}", f"train.steps={arguments.steps}"]
    command += [f"data.shards={arguments.shards}", f"eval.images={arguments.images}", "log.wandb=disabled"]
    command += [f"eval.every={arguments.steps}", f"run.dir={run}", f"train.checkpoint_every={arguments.steps}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return read_journal(run / "metrics.jsonl")[-1]["eval/loss"]


def compared(arguments: argparse.Namespace, losses: dict[str, list[float]]) -> Report:
    """Table and numbers."""
    fp32, bf16 = losses.values()
    rows = [
        [str(seed), *(f"{loss[index]:.4f}" for loss in (fp32, bf16)), f"{bf16[index] / fp32[index] - 1:+.3%}"]
        for index, seed in enumerate(arguments.seeds)
    ]
    rows.append(["mean", f"{mean(fp32):.4f}", f"{mean(bf16):.4f}", f"{mean(bf16) / mean(fp32) - 1:+.3%}"])
    notes = [f"Over seeds, fp32 varies by {stdev(fp32) / mean(fp32):.2%} (standard deviation)."] if rows[2:] else []
    title = f"Evaluation loss of {arguments.model} after {arguments.steps} steps of 8 crops"
    return Report(
        name="same_loss",
        title=title,
        machine=machine(torch.device("cpu"), ("python", "benchmarks/same_loss.py")),
        tables=[Table(title="", headings=["seed", *VARIANTS, "difference"], rows=rows, notes=notes)],
        results={"seeds": arguments.seeds, "losses": losses},
    )


if __name__ == "__main__":
    main()
