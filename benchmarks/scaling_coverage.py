"""Coverage of the intervals of scaling laws, over simulated ladders whose law is known.

    python benchmarks/scaling_coverage.py [--simulations 1000] [--out FOLDER]

Losses are the law's times e^(noise·N(0, 1)). An interval covers if it holds the true value; nominal: 95 %.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import median

import numpy as np
import torch
from bench.machine import machine
from bench.report import Report, Table, publish

from hpcm_scale.errors import entry_point
from hpcm_scale.scaling.laws.compute_optimal import Cost, compute_optimal
from hpcm_scale.scaling.laws.fits import bounded, fit_parameters_and_data, fit_power_law, fit_saturating_power_law
from hpcm_scale.scaling.laws.law import CannotFit, Points, Prediction
from hpcm_scale.tracking.progress import progress

PAPER = np.array([68.5e6, 120e6, 246e6, 544e6, 1000e6])
"""The five sizes of arXiv 2508.09075."""
SIX = np.array([2e6, 4.3e6, 17e6, 30e6, 68e6, 120e6])
ONE_VARIABLE = [
    ("five, 0.55 + 2·N^−0.15", PAPER, 0.55, 2.0, 0.15),
    ("five, 2·N^−0.15", PAPER, 0.0, 2.0, 0.15),
    ("six, 0.5 + 8·N^−0.2", SIX, 0.5, 8.0, 0.2),
    ("six, 8·N^−0.2", SIX, 0.0, 8.0, 0.2),
]
"""Sizes and law; E, A, α."""
NOISES = (0.001, 0.003, 0.01)
JOINT = {"E": 0.5, "A": 8.0, "alpha": 0.2, "B": 150.0, "beta": 0.25}
"""L(N, D), D in pixels."""
COST = Cost.exact(40.0, 0.79)
"""FLOP per pixel."""
GRIDS = {
    "6 × 3, span 10": (SIX / 10, 10.0, 3),
    "6 × 4, span 16": (SIX / 10, 16.0, 4),
    "4 × 3, span 4": (SIX[:4] / 10, 4.0, 3),
}
"""Sizes, ratio of the largest to the smallest amount of data, amounts."""
LEAST_DATA = 2e8


def points_of(loss: np.ndarray, **variables: np.ndarray) -> Points:
    """Points of simulated trainings."""
    names = tuple(f"run {index}" for index in range(loss.size))
    return Points(
        "parameters" if len(variables) == 1 else "parameters_and_data", variables, loss, names, names, "simulated"
    )


def covers(prediction: Prediction, truth: float) -> bool:
    """Whether the interval holds the truth."""
    return bool(prediction.low <= truth <= prediction.high)


def share(hits: list[bool]) -> str:
    """A coverage with its Monte-Carlo standard error, in percent."""
    if not hits:
        return "–"
    mean = float(np.mean(hits))
    return f"{100 * mean:.1f} ± {100 * math.sqrt(max(mean * (1 - mean), 1e-9) / len(hits)):.1f}"


def width(prediction: Prediction) -> float:
    """Log ratio of the bounds."""
    return math.log(prediction.high / max(prediction.low, 1e-9))


def of_size(simulations: int) -> list[list[str]]:
    """Rows on L(N) at ten times the largest size."""
    rows = []
    for name, sizes, floor, amplitude, exponent in ONE_VARIABLE:
        ahead = 10 * sizes[-1]
        truth, losses = (floor + amplitude * x**-exponent for x in (ahead, sizes))
        for noise in NOISES:
            generator = np.random.default_rng(1)
            hits: dict[str, list[bool]] = {"used": [], "new": [], "power law": [], "saturating": []}
            widths: dict[str, list[float]] = {"used": [], "right": []}
            for _ in progress(range(simulations), description=f"{name}, {noise:.1%}"):
                points = points_of(losses * np.exp(noise * generator.standard_normal(sizes.size)), N=sizes)
                line, saturating = fit_power_law(points), fit_saturating_power_law(points)
                used = bounded(line, saturating, lambda law, at=ahead: law.predict(at))
                hits["used"].append(covers(used, truth))
                hits["new"].append(covers(used, truth * math.exp(noise * generator.standard_normal())))
                for kind, law in (("power law", line), ("saturating", saturating)):
                    hits[kind].append(covers(law.predict(ahead), truth))
                widths["used"].append(width(used))
                widths["right"].append(width((saturating if floor else line).predict(ahead)))
            ratio = median(widths["used"]) / median(widths["right"])
            rows.append([name, f"{noise:.1%}", *(share(each) for each in hits.values()), f"{ratio:.2f}"])
    return rows


def of_size_and_data(simulations: int) -> list[list[str]]:
    """Rows on L(N, D) and what follows from it at ten times the largest compute."""
    rows = []
    e, a, alpha, b, beta = JOINT.values()
    for name, (sizes, span, amounts) in GRIDS.items():
        data = LEAST_DATA * np.geomspace(1, span, amounts)
        n, d = (axis.ravel() for axis in np.meshgrid(sizes, data))
        losses = e + a * n**-alpha + b * d**-beta
        spent = COST.k * n**COST.kappa * d / 1e15
        budget = 10 * spent.max()
        growth = beta / (alpha + COST.kappa * beta)
        money = 1e15 * budget / COST.k
        best = (alpha * a / (COST.kappa * beta * b) * money**beta) ** (1 / (alpha + COST.kappa * beta))
        best_data = money / best**COST.kappa
        least = e + a * best**-alpha + b * best_data**-beta
        far = e + a * (10 * n.max()) ** -alpha + b * (10 * d.max()) ** -beta
        for noise in NOISES:
            generator = np.random.default_rng(1)
            kinds = ("L at 10 N, 10 D", "L*", "N*", "D*", "exponent of N*", "C for L*")
            hits: dict[str, list[bool]] = {kind: [] for kind in kinds}
            refused = 0
            for _ in progress(range(simulations), description=f"{name}, {noise:.1%}"):
                try:
                    points = points_of(losses * np.exp(noise * generator.standard_normal(n.size)), N=n, D=d)
                    law = fit_parameters_and_data(points)
                    optimal = compute_optimal(law, COST, (spent.min(), spent.max()))
                except CannotFit:
                    refused += 1
                    continue
                size, pixels = optimal.optimum_intervals(budget)
                found = (
                    (law.predict((10 * n.max(), 10 * d.max())), far),
                    (optimal.predict(budget), least),
                    (size, best),
                    (pixels, best_data),
                    (optimal.growth_intervals()[0], growth),
                    (optimal.compute_for(least), budget),
                )
                for kind, (predicted, truth) in zip(kinds, found, strict=True):
                    hits[kind].append(covers(predicted, truth))
            rows.append(
                [name, f"{noise:.1%}", *(share(each) for each in hits.values()), f"{refused / simulations:.1%}"]
            )
    return rows


@entry_point
def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    size, data = of_size(arguments.simulations), of_size_and_data(arguments.simulations)
    tables = [
        Table(
            "L(N) at ten times the largest size",
            ["law", "noise", "covered, %", "new training, %", "power law alone", "saturating alone", "width"],
            size,
            [
                "Covered: the interval that is used (`laws.fits.bounded`) holds the true loss, and the loss of one new "
                "training. Alone: the intervals of either law. Width: median, relative to the law of the true form. "
                "Where E = 0, that is a power law, and no interval that covers weak irreducible losses too can be as "
                "narrow: with five sizes the two cannot be told apart.",
            ],
        ),
        Table(
            "L(N, D) and the compute-optimal law at ten times the largest compute",
            ["grid", "noise", "L at 10 N, 10 D", "L*", "N*", "D*", "exponent of N*", "C for L*", "refused"],
            data,
            ["Coverage in percent. Refused: the fit, or the optimum, as not determined."],
        ),
    ]
    title = f"Coverage of 95 % intervals, {arguments.simulations:,} simulations each"
    measured_on = machine(torch.device("cpu"), ("python", "benchmarks/scaling_coverage.py"))
    values = {"of_size": size, "of_size_and_data": data}
    publish(Report("scaling_coverage", title, measured_on, tables, values), arguments.out)


if __name__ == "__main__":
    main()
