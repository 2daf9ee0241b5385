"""Predicted standard errors of designed sweeps against those of simulated fits.

    python benchmarks/scaling_design.py [--simulations 1000] [--out FOLDER]

Losses are the assumed law's at the designed trainings, times e^(noise·N(0, 1)). L(N, D) is fitted to each simulated
sweep; half the range from the 16th to the 84th percentile of an estimate is its simulated standard error.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from bench.machine import machine
from bench.report import Report, Table, publish

from hpcm_scale.errors import entry_point
from hpcm_scale.formatting import counted, significant
from hpcm_scale.scaling.design import AHEAD, Design, design
from hpcm_scale.scaling.design_experiment import commands, describe
from hpcm_scale.scaling.laws.compute_optimal import Cost, compute_optimal
from hpcm_scale.scaling.laws.fits import fit_parameters_and_data
from hpcm_scale.scaling.laws.law import CannotFit, Points
from hpcm_scale.tracking.progress import progress

DESIGNS = (
    (5.0, "200k,400k,800k,1600k,3200k", 0.003, 1),
    (5.0, "200k,400k,800k,1600k,3200k", 0.001, 1),
    (5.0, "nano,450k,micro,2m,mini", 0.003, 2),
    (500.0, "1m,3m,10m,30m,100m", 0.01, 1),
)
"""PFLOPs, sizes, noise and seeds."""


def simulated(made: Design, noise: float, simulations: int) -> tuple[np.ndarray, float]:
    """Standard errors of α, β and log N* at the largest compute and at ten times it, (4,), and the part refused."""
    parameters = np.repeat([float(size.parameters) for size in made.sizes], made.steps.shape[1])
    pixels = made.steps.ravel() * float(made.settings.pixels_per_step)
    parameters, pixels = (np.tile(each, made.seeds) for each in (parameters, pixels))
    truth, _ = made.law.log_loss((parameters, pixels))
    cost = Cost.exact(made.optimal.parameters["k"], made.optimal.parameters["kappa"])
    names = tuple(map(str, range(truth.size)))
    generator, found = np.random.default_rng(1), []
    for _ in progress(range(simulations), description="fits", unit="fit"):
        losses = np.exp(truth + noise * generator.standard_normal(truth.size))
        points = Points("parameters_and_data", {"N": parameters, "D": pixels}, losses, names, names, "simulated")
        try:
            law = fit_parameters_and_data(points)
            optimum = compute_optimal(law, cost, made.optimal.observed["C"]).optimum(
                np.array([1, AHEAD]) * made.largest
            )
        except CannotFit:
            continue
        found.append([law.parameters["alpha"], law.parameters["beta"], *np.log(optimum.parameters)])
    low, high = np.percentile(found, [16, 84], axis=0)
    return (high - low) / 2, 1 - len(found) / simulations


@entry_point
def main() -> None:
    """Design, simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    designs = [design(pflops, sizes.split(","), noise=noise, seeds=seeds) for pflops, sizes, noise, seeds in DESIGNS]
    example = [[each] for each in describe(designs[0])]
    example += [[f"`{command}`"] for command in commands(designs[0], "five_pflops")]
    rows = []
    for made, (pflops, sizes, noise, seeds) in zip(designs, DESIGNS, strict=True):
        errors = made.law.standard_errors or {}
        far = (made.error_of_size(factor * made.largest) for factor in (1, AHEAD))
        expected = np.array([errors["alpha"], errors["beta"], *far])
        measured, refused = simulated(made, noise, arguments.simulations)
        rows.append(
            [
                f"{pflops:g} PFLOPs, {sizes}, {noise:.1%}, {counted(seeds, 'seed')}",
                f"{made.steps.size * seeds}, {made.spread}",
                f"{made.condition:.0f}",
                *(
                    f"{significant(each, 2)} / {significant(other, 2)} ({each / other:.2f})"
                    for each, other in zip(expected, measured, strict=True)
                ),
                f"{refused:.1%}",
            ]
        )
    headings = ["design", "trainings", "condition", "α", "β", "log N*", "log N* at ten times", "refused"]
    notes = [
        "Predicted / simulated standard error (ratio). log N*: at the compute of the largest training, and at ten "
        "times that. Refused: fits that do not determine the law or an optimum. The Monte-Carlo standard error "
        f"of a simulated value is {0.96 / arguments.simulations**0.5:.1%}.",
        "The assumed law is that of `hpcm scaling design` without `--laws`. Its residuals are independent; in a real "
        "sweep those of cooldowns of one run may not be.",
    ]
    tables = [
        Table("", headings, rows, notes),
        Table(
            "The first design: conf/experiment/five_pflops.yaml",
            ["`hpcm scaling design`"],
            [[each] for each in example],
            [],
        ),
    ]
    title = f"Predicted errors of designed sweeps, against {arguments.simulations:,} simulated fits each"
    measured_on = machine(torch.device("cpu"), ("python", "benchmarks/scaling_design.py"))
    publish(Report("scaling_design", title, measured_on, tables, {"rows": rows}), arguments.out)


if __name__ == "__main__":
    main()
