"""What a change is worth: arms of runs, a few seeds each, against a baseline with the same seeds.

    python benchmarks/ablations.py plain='runs/plain_*' upstream='runs/upstream_*' ema='runs/plain_*:eval_ema_0.05/loss'

An arm is NAME=RUNS, or NAME=RUNS:KEY for another measure than `eval/loss`; the first one is the baseline. RUNS: run
folders, or journals that `hpcm scaling collect` has made. Where a folder holds `evaluation.json` of `hpcm evaluate
--out`, its loss counts: all arms by one measure, whatever they were trained with. Prints a Markdown table: means over
the seeds, and 95 % t intervals of the differences between runs of one seed, which see the same crops in the same order.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from hpcm_scale.config.compose import from_yaml
from hpcm_scale.errors import UserError, one_line
from hpcm_scale.model.parameters import on_meta, parameter_count
from hpcm_scale.tracking.journal import read_journal

LOSS = "eval/loss"


class Run(NamedTuple):
    """One training, at its end."""

    parameters: int
    pflops: float
    loss: float


def read_run(folder: Path, key: str) -> tuple[int, Run]:
    """The seed of a run, and its end. Raises UserError if it has none."""
    config = from_yaml(folder / "config.yaml")
    lines = [line for line in read_journal(folder / "metrics.jsonl") if key in line]
    if not lines or lines[-1]["step"] != config.train.steps:
        raise UserError(f"{folder} has no {key} at its last step; let it finish, or leave it out")
    loss = lines[-1][key]
    evaluated = folder / "evaluation.json"
    if key == LOSS and evaluated.is_file():
        (curve,) = json.loads(evaluated.read_text(encoding="utf-8"))["curves"]
        (point,) = curve["points"]
        loss = point["mean"]["loss"]
    return config.train.seed, Run(parameter_count(on_meta(config.model)), lines[-1]["compute/pflops"], loss)


def read_arm(argument: str) -> tuple[str, dict[int, Run]]:
    """Name, and runs by seed."""
    name, _, where = argument.partition("=")
    pattern, _, key = where.partition(":")
    root = Path(pattern).anchor
    folders = [path for path in sorted(Path(root or ".").glob(pattern.removeprefix(root))) if path.is_dir()]
    runs = [read_run(folder, key or LOSS) for folder in folders]
    if not runs:
        raise UserError(f"{argument} names no runs; write NAME=RUNS or NAME=RUNS:KEY")
    if len({seed for seed, _ in runs}) < len(runs) or len({run.parameters for _, run in runs}) > 1:
        raise UserError(f"{argument} names runs of one seed, or of several sizes; name one run of each seed")
    return name, dict(runs)


def interval(differences: np.ndarray) -> float:
    """Half the width of the 95 % t interval of their mean."""
    if len(differences) < 2:
        return math.nan
    return stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / math.sqrt(len(differences))


def row(name: str, runs: dict[int, Run], baseline: dict[int, Run]) -> str:
    """A line of the table."""
    seeds = sorted(runs.keys() & baseline.keys())
    losses = np.array([runs[seed].loss for seed in seeds])
    percent = 100 * (losses / [baseline[seed].loss for seed in seeds] - 1)
    any_run = runs[seeds[0]]
    against = "" if runs is baseline else f"{percent.mean():+.2f} ± {interval(percent):.2f}"
    spread = f"{losses.mean():.4f} ± {interval(losses):.4f}"
    return f"| {name} | {any_run.parameters:,} | {any_run.pflops:.5f} | {len(seeds)} | {spread} | {against} |"


@one_line
def main() -> None:
    """Print the table."""
    arms = dict(read_arm(argument) for argument in sys.argv[1:])
    if not arms:
        raise UserError("name arms as NAME=RUNS; the first one is the baseline")
    baseline = next(iter(arms.values()))
    for name, runs in arms.items():
        if not runs.keys() & baseline.keys():
            raise UserError(f"{name} has no seed in common with the first arm; train it with the same seeds")
    print("| arm | parameters | PFLOPs | seeds | loss | against the first, % |")
    print("|---|--:|--:|--:|--:|--:|")
    for name, runs in arms.items():
        print(row(name, runs, baseline))


if __name__ == "__main__":
    main()
