"""Efficiencies of a recipe, and R* of repeated data, from simulated trainings whose law is known.

    python benchmarks/scaling_recipes.py [--simulations 500] [--out FOLDER]

Losses are the law's times e^(noise·N(0, 1)). An interval covers if it holds the true value; nominal: 95 %.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from bench.machine import machine
from bench.report import Report, Table, publish
from scipy import stats

from hpcm_scale.errors import entry_point
from hpcm_scale.scaling.compare import SIGNIFICANT, compare
from hpcm_scale.scaling.laws.law import CannotFit, Points
from hpcm_scale.scaling.laws.repeated import effective_pixels, fit_repeated
from hpcm_scale.scaling.laws.shared import p_equal_exponents
from hpcm_scale.scaling.observations import Observation
from hpcm_scale.tracking.progress import progress

KAPPA, DEARER = 0.8, 1.05
"""Exponent of the cost per pixel, and cost of the second recipe relative to the first."""
LAW = {"E": 0.5, "A": 0.3, "alpha": 0.25, "B": 0.2, "beta": 0.4}
"""Terms at 2 M parameters and 1 G pixels."""


class Design(NamedTuple):
    """Trainings of each recipe, and how the second differs from the first."""

    name: str
    sizes: tuple[float, ...]
    amounts: tuple[float, ...]
    seeds: int = 1
    by_size: float = 1.0
    """ρ_N."""
    by_data: float = 1.3
    """ρ_D."""
    difference: float = 0.0
    """β of the second recipe minus that of the first."""


def spread(centre: float, span: float, number: int) -> tuple[float, ...]:
    """So many values over a ratio `span`."""
    return tuple(centre * np.geomspace(span**-0.5, span**0.5, number))


ONE, SIX, FIVE = (2e6,), spread(2e6, 100, 6), spread(1e9, 10, 5)
DESIGNS = (
    Design("one size, 5 amounts", ONE, FIVE),
    Design("one size, 3 amounts × 2 seeds", ONE, spread(1e9, 10, 3), 2),
    Design("one size, 2 amounts × 3 seeds", ONE, spread(1e9, 2, 2), 3),
    Design("6 sizes, one amount", SIX, (1e9,), 1, 1.3, 1.0),
    Design("6 sizes × 3 amounts", SIX, spread(1e9, 10, 3)),
    Design("6 sizes × 3 amounts, ρ_N = 0.8", SIX, spread(1e9, 10, 3), 1, 0.8),
    Design("2 sizes × 4 amounts", spread(2e6, 10, 2), spread(1e9, 10, 4)),
    Design("one size, 5 amounts, β + 0.1", ONE, FIVE, difference=0.1),
    Design("6 sizes × 3 amounts, β + 0.1", SIX, spread(1e9, 10, 3), difference=0.1),
    Design("one size, 5 amounts, ρ_N = 1.1", ONE, FIVE, by_size=1.1),
)
NOISES = (0.003, 0.01)
HEADINGS = [
    "trainings of each recipe",
    "noise",
    "truth",
    "estimate",
    "covered, %",
    "compute covered, %",
    "equal exponents rejected, %",
    "separate exponents, tenfold",
    "refused",
]
SETS = (1e9, 1e12)
"""Pixels of the training sets: one repeats."""
REPETITIONS = (4.0, 15.0)


def trainings(design: Design, second: bool) -> list[Observation]:
    """Trainings of one recipe without noise."""
    found = []
    e, a, alpha, b, beta = LAW.values()
    for size, pixels, seed in product(design.sizes, design.amounts, range(design.seeds)):
        size_term = a * (size * (design.by_size if second else 1.0) / 2e6) ** -alpha
        data = pixels * (design.by_data if second else 1.0) / 1e9
        loss = e + size_term + b * data ** -(beta + second * design.difference)
        cost = 40 * size**KAPPA * (DEARER if second else 1.0)
        found.append(
            Observation(
                run=f"{second} {size} {pixels} {seed}",
                model=f"{size}",
                parameters=round(size),
                lmbda=0.013,
                seed=seed,
                pixels=pixels,
                images=round(pixels / 65536),
                pflops=cost * pixels / 1e15,
                flops_per_pixel=cost,
                loss=loss,
                bpp=None,
                psnr=None,
                annealed=True,
                finished=True,
            )
        )
    return found


def share(hits: list[bool]) -> str:
    """A fraction with its Monte-Carlo standard error, in percent."""
    if not hits:
        return "–"
    mean = float(np.mean(hits))
    return f"{100 * mean:.1f} ± {100 * math.sqrt(max(mean * (1 - mean), 1e-9) / len(hits)):.1f}"


def estimates(values: list[float], digits: int = 2) -> str:
    """Median, 2.5 % and 97.5 % quantiles."""
    if not values:
        return "–"
    middle, low, high = np.quantile(values, (0.5, 0.025, 0.975))
    return f"{middle:.{digits}f} ({low:.{digits}f}…{high:.{digits}f})"


def of_recipes(simulations: int) -> list[list[str]]:
    """Rows on `compare`."""
    rows = []
    for design, noise in product(DESIGNS, NOISES):
        exact = trainings(design, False), trainings(design, True)
        generator = np.random.default_rng(1)
        main = "D" if len(design.amounts) > 1 else "N"
        if len(design.sizes) == 1:  # what is needed for equal loss at the centre
            gain = LAW["A"] / LAW["B"] * (1 - design.by_size ** -LAW["alpha"])
            truth = compute = design.by_data * (1 + gain) ** (1 / LAW["beta"])
        else:
            truth = design.by_data if main == "D" else design.by_size
            compute = design.by_data * design.by_size**KAPPA
        found, apart, hits, hits_compute, rejected = [], [], [], [], []
        for _ in progress(range(simulations), description=f"{design.name}, {noise:.1%}"):
            noisy = [
                [replace(each, loss=each.loss * math.exp(noise * generator.standard_normal())) for each in recipe]
                for recipe in exact
            ]
            try:
                compared = compare(*noisy)
            except CannotFit:
                continue
            of = {each.of: each for each in compared.efficiencies}
            [one] = [each for name, each in of.items() if f"ρ_{main}" in name]
            last = compared.efficiencies[-1]
            found.append(one.value)
            hits.append(one.low <= truth <= one.high)
            hits_compute.append(last.low <= compute / DEARER <= last.high)
            if compared.separate is not None:
                rejected.append(p_equal_exponents(compared.law, compared.separate) < SIGNIFICANT)
                p = compared.separate.parameters
                ahead = math.log(10 * max(getattr(design, "amounts" if main == "D" else "sizes")))
                ahead -= math.log(2e6 if main == "N" else 1e9)
                change = p[f"difference_{main}"]
                log_ratio = ahead * change / max(p[f"exponent_{main}"] + change, 1e-3) + p[f"log_rho_{main}"]
                apart.append(math.exp(min(log_ratio, 99)))
        answer = [estimates(found), share(hits), share(hits_compute), share(rejected), estimates(apart)]
        refused = f"{1 - len(found) / simulations:.1%}"
        rows.append([design.name, f"{noise:.1%}", f"ρ_{main} = {truth:.3g}", *answer, refused])
    return rows


def of_repetition(simulations: int) -> list[list[str]]:
    """Rows on `fit_repeated`: 4 sizes × 5 amounts × 2 sets."""
    rows = []
    sizes, amounts, sets = spread(2e6, 30, 4), spread(3e9, 100, 5), SETS
    n, d, u = (axis.ravel() for axis in np.meshgrid(sizes, amounts, sets, indexing="ij"))
    names = tuple(f"run {index}" for index in range(n.size))
    e, a, alpha, b, beta = LAW.values()
    for repetitions, noise in product(REPETITIONS, NOISES):

        def loss(size, pixels, unique, repetitions=repetitions):
            effective, _ = effective_pixels(np.asarray(pixels), np.asarray(unique), repetitions)
            return e + a * (size / 2e6) ** -alpha + b * (effective / 1e9) ** -beta

        generator = np.random.default_rng(1)
        found, hits, ahead = [], [], []
        for _ in progress(range(simulations), description=f"R* = {repetitions:g}, {noise:.1%}"):
            losses = loss(n, d, u) * np.exp(noise * generator.standard_normal(n.size))
            try:
                law = fit_repeated(
                    Points("parameters_and_data", {"N": n, "D": d}, losses, names, names, "simulated"), u
                )
            except CannotFit:
                continue
            found.append(law.parameters["R"])
            error = (law.standard_errors or {})["R"] / law.parameters["R"]
            hits.append(
                abs(math.log(law.parameters["R"] / repetitions))
                <= float(stats.t.ppf(0.975, law.degrees_of_freedom)) * error
            )
            far = (max(sizes), 10 * max(amounts), min(sets))
            predicted = law.predict(far)
            ahead.append(predicted.low <= float(loss(*far)) <= predicted.high)
        refused = f"{1 - len(found) / simulations:.1%}"
        rows.append([f"{repetitions:g}", f"{noise:.1%}", estimates(found, 1), share(hits), share(ahead), refused])
    return rows


@entry_point
def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--simulations", type=int, default=500)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    recipes, repetition = of_recipes(arguments.simulations), of_repetition(arguments.simulations * 2 // 5)
    tables = [
        Table(
            "Efficiency of the second recipe",
            HEADINGS,
            recipes,
            [
                "Estimate and separate exponents: median (2.5…97.5 % of the simulations). Separate exponents: the "
                "efficiency at ten times the largest size or amount of data by the law without shared exponents. The "
                "second recipe costs 5 % more a pixel. With β + 0.1 the efficiency depends on the amount of data; its "
                "truth is that at the centre. In the last design the recipes differ in the term of size too: its "
                "truth is the data needed for equal loss at the centre.",
            ],
        ),
        Table(
            "R* of repeated data",
            ["R*", "noise", "estimate", "covered, %", "loss ahead covered, %", "refused"],
            repetition,
            [
                "4 sizes × 5 amounts of data, up to 30 G pixels, on a set of 1 G pixels and on one that does not "
                "repeat. Loss ahead: of the largest size after 300 repetitions of the small set.",
            ],
        ),
    ]
    title = f"Recipes compared ({arguments.simulations:,} simulations each), and repeated data (two fifths)"
    measured_on = machine(torch.device("cpu"), ("python", "benchmarks/scaling_recipes.py"))
    values = {"recipes": recipes, "repetition": repetition}
    publish(Report("scaling_recipes", title, measured_on, tables, values), arguments.out)


if __name__ == "__main__":
    main()
