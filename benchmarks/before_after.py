"""How fast is a training step of this checkout, compared with another one on the same machine at the same time?

    git worktree add ../before COMMIT
    python benchmarks/before_after.py --before ../before [--preset 68m] [--batch 2] [--precision bf16] [--rounds 15]

Each checkout has its own process with one thread. The two take steps alternately, so that other jobs of the machine
affect both alike. Printed: processor time per step, and the ratio of the two, round by round.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from bench.machine import machine
from bench.report import Report, Table, publish, with_quartiles
from bench.step import Steps, Variant
from bench.timing import ratio

from hpcm_scale.config.compose import compose
from hpcm_scale.config.schema import Precision
from hpcm_scale.tracking.progress import progress

HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, help="the other checkout")
    parser.add_argument("--preset", default="68m")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", default="bf16", choices=[precision.value for precision in Precision])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.step:
        take_steps(chosen)
    else:
        publish(compared(chosen, alternated(chosen)), chosen.out)


def take_steps(chosen: argparse.Namespace) -> None:
    """Take a step for every line of standard input; print its processor seconds and its loss."""
    torch.set_num_threads(1)
    step = Steps(compose([f"model={chosen.preset}"]), chosen.batch, torch.device("cpu")).of(
        Variant(Precision(chosen.precision))
    )
    step()
    for _ in sys.stdin:
        began = time.process_time()
        loss = step()
        print(time.process_time() - began, loss.item(), flush=True)


def alternated(chosen: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Processor seconds and loss of each checkout's steps; every other round runs in reverse order."""
    options = ["--preset", chosen.preset, "--batch", str(chosen.batch), "--precision", chosen.precision]
    workers = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--step", *options],
            env=os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, folder in (("before", chosen.before.resolve()), ("after", HERE))
    }
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    for number in progress(range(chosen.rounds + 1), description="rounds", unit="round"):
        for name in list(workers)[:: -1 if number % 2 else 1]:
            worker = workers[name]
            print(file=worker.stdin, flush=True)
            seconds, loss = map(float, worker.stdout.readline().split())
            if number:  # the first is the warm-up
                samples[name].append((seconds, loss))
    for worker in workers.values():
        worker.communicate()
    return samples


def compared(chosen: argparse.Namespace, samples: dict[str, list[tuple[float, float]]]) -> Report:
    """Table and numbers."""
    seconds = {name: [second for second, _ in of] for name, of in samples.items()}
    faster = ratio(seconds["before"], seconds["after"])
    rows = []
    for name, of in seconds.items():
        times_as_fast = with_quartiles(ratio(seconds["before"], of), 2, "×")
        rows.append([name, f"{median(of):.3f}", times_as_fast, f"{samples[name][0][1]:.6g}"])
    commit = subprocess.run(
        ["git", "-C", chosen.before, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return Report(
        name="before_after",
        title=f"A training step of {chosen.preset} before and after, {chosen.precision}, {chosen.batch} crops of 256²",
        machine=machine(torch.device("cpu")),
        tables=[
            Table(
                title="",
                headings=["checkout", "processor seconds", "times as fast", "loss"],
                rows=rows,
                notes=[
                    f"Before: commit {commit}. One thread each. Forward, loss, backward, gradient clipping and Adam; "
                    f"{chosen.rounds} alternating rounds after one warm-up; medians, in brackets the quartiles of the "
                    "rounds' ratios."
                ],
            )
        ],
        results={"before": commit, "seconds": seconds, "times_as_fast": faster._asdict()},
    )


if __name__ == "__main__":
    main()
