"""Ablations: arms of runs with several seeds each, compared with a baseline of the same seeds.

    python benchmarks/ablations.py plain='runs/plain_*' upstream='runs/upstream_*' ema='runs/plain_*:eval_ema_0.05/loss'

An arm is NAME=RUNS, or NAME=RUNS:KEY for another metric than `eval/loss`; the first arm is the baseline. RUNS: run
folders, or journals collected by `hpcm scaling collect`. If a folder holds `evaluation.json` of `hpcm evaluate --out`,
its loss is used: one metric for all arms, whatever their training objective. Prints a Markdown table: means over the
seeds, and 95 % t intervals of the differences between runs of one seed, which see the same crops in the same order.
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
from hpcm_scale.errors import UserError, entry_point
from hpcm_scale.formatting import markdown_table
from hpcm_scale.model.parameters import on_meta, parameter_count
from hpcm_scale.tracking.journal import read_journal

LOSS = "eval/loss"


class Run(NamedTuple):
    """The end of one run."""

    parameters: int
    pflops: float
    loss: float


def read_run(folder: Path, key: str) -> tuple[int, Run]:
    """The seed of a run, and its end. Raises UserError for an unfinished run."""
    config = from_yaml(folder / "config.yaml")
    lines = [line for line in read_journal(folder / "metrics.jsonl") if key in line]
    if not lines or lines[-1]["step"] != config.train.steps:
        raise UserError("unfinished-run", "", f"{folder} has no {key} at its last step; let it finish, or omit it")
    loss = lines[-1][key]
    evaluated = folder / "evaluation.json"
    if key == LOSS and evaluated.is_file():
        (curve,) = json.loads(evaluated.read_text(encoding="utf-8"))["curves"]
        (point,) = curve["points"]
        loss = point["mean"]["loss"]
    return config.train.seed, Run(parameter_count(on_meta(config.model)), lines[-1]["compute/pflops"], loss)


def read_arm(argument: str) -> tuple[str, dict[int, Run]]:
    """The name of an arm and its runs by seed."""
    name, _, where = argument.partition("=")
    pattern, _, key = where.partition(":")
    root = Path(pattern).anchor
    folders = [path for path in sorted(Path(root or ".").glob(pattern.removeprefix(root))) if path.is_dir()]
    runs = [read_run(folder, key or LOSS) for folder in folders]
    if not runs:
        raise UserError("arm-without-runs", "", f"{argument} names no runs; write NAME=RUNS or NAME=RUNS:KEY")
    if len({seed for seed, _ in runs}) < len(runs) or len({run.parameters for _, run in runs}) > 1:
        raise UserError(
            "arm-mixes-runs",
            "",
            f"{argument} names several runs of one seed, or several model sizes; name one run per seed",
        )
    return name, dict(runs)


def interval(differences: np.ndarray) -> float:
    """Half-width of the 95 % t interval of the mean."""
    if len(differences) < 2:
        return math.nan
    return stats.t.ppf(0.975, len(differences) - 1) * differences.std(ddof=1) / math.sqrt(len(differences))


def row(name: str, runs: dict[int, Run], baseline: dict[int, Run]) -> list[str]:
    """A row of the table."""
    seeds = sorted(runs.keys() & baseline.keys())
    losses = np.array([runs[seed].loss for seed in seeds])
    percent = 100 * (losses / [baseline[seed].loss for seed in seeds] - 1)
    any_run = runs[seeds[0]]
    difference = "" if runs is baseline else f"{percent.mean():+.2f} ± {interval(percent):.2f}"
    mean = f"{losses.mean():.4f} ± {interval(losses):.4f}"
    return [name, f"{any_run.parameters:,}", f"{any_run.pflops:.5f}", str(len(seeds)), mean, difference]


@entry_point
def main() -> None:
    """Print the table."""
    arms = dict(read_arm(argument) for argument in sys.argv[1:])
    if not arms:
        raise UserError("no-arms", "", "no arms are given; name them as NAME=RUNS, the baseline first")
    baseline = next(iter(arms.values()))
    for name, runs in arms.items():
        if not runs.keys() & baseline.keys():
            raise UserError(
                "no-common-seeds", "", f"{name} has no seed in common with the first arm; train it with the same seeds"
            )
    headings = ["arm", "parameters", "PFLOPs", "seeds", "loss", "difference, %"]
    print(markdown_table(headings, [row(name, runs, baseline) for name, runs in arms.items()]))


if __name__ == "__main__":
    main()
