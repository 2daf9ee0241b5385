"""Surfaces of known parameters, samples of them, and a study of trainings on one."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from hpcm_scale.scaling.laws.law import Points
from hpcm_scale.scaling.observations import Curve, Observation, Study

SIZES = np.geomspace(2e5, 2e7, 6)
AMOUNTS = np.geomspace(1e8, 1e10, 3)
COST = (40.0, 0.79)
"""k and κ of training FLOP per pixel."""


def floor_surface(x: np.ndarray | float, floor: float, alpha: float = 0.3) -> np.ndarray | float:
    """A loss that is 1 at the smallest of `SIZES`."""
    return floor + (1 - floor) * (np.asarray(x) / SIZES[0]) ** -alpha


def joint_surface(parameters: np.ndarray | float, pixels: np.ndarray | float) -> np.ndarray | float:
    """E = 0.5, α = 0.25, β = 0.4; both other terms matter."""
    return 0.5 + 0.3 * (np.asarray(parameters) / 2e6) ** -0.25 + 0.2 * (np.asarray(pixels) / 1e9) ** -0.4


def points_of(loss: np.ndarray, of: str, **variables: np.ndarray) -> Points:
    """Points that come from no run."""
    names = tuple(f"point {index + 1}" for index in range(len(loss)))
    arrays = {name: np.asarray(values, np.float64) for name, values in variables.items()}
    return Points(of, arrays, np.asarray(loss, np.float64), names, names, "numbers")


def size_points(loss: np.ndarray, sizes: np.ndarray = SIZES) -> Points:
    """Points of L(N)."""
    return points_of(loss, "parameters", N=sizes)


def joint_points(noise: np.ndarray | float = 0.0) -> Points:
    """Points of L(N, D) on the whole grid, times e^noise."""
    parameters, pixels = (axis.ravel() for axis in np.meshgrid(SIZES, AMOUNTS))
    return points_of(joint_surface(parameters, pixels) * np.exp(noise), "parameters_and_data", N=parameters, D=pixels)


def columns(path: Path, *names: str, **where: str) -> list[np.ndarray]:
    """Columns of a CSV as float64, of the rows that have these values and no gap."""
    with path.open(encoding="utf-8") as handle:
        rows = [row for row in csv.DictReader(handle) if all(row[key] == value for key, value in where.items())]
    rows = [row for row in rows if all(row[name] for name in names)]
    return [np.array([float(row[name]) for row in rows]) for name in names]


def training(size: float, pixels: float, loss: float, *, seed: int = 0, **facts) -> Observation:
    """One annealed training of a size, named by what it was."""
    size, pixels = round(size), float(pixels)
    per_pixel = COST[0] * size ** COST[1]
    values = {
        "run": f"n{size}-d{pixels:.0f}-s{seed}",
        "model": f"n{size}",
        "parameters": size,
        "lmbda": 0.013,
        "seed": seed,
        "pixels": pixels,
        "images": round(pixels / 65536),
        "pflops": pixels * per_pixel / 1e15,
        "flops_per_pixel": per_pixel,
        "loss": float(loss),
        "bpp": 0.4 * float(loss),
        "psnr": 33.0,
        "annealed": True,
        "finished": True,
    }
    return Observation(**(values | facts))


def study_of(observations: Sequence[Observation]) -> Study:
    """A study in which each curve is nothing but its end."""
    curves = [
        Curve(
            run=each.run,
            model=each.model,
            parameters=each.parameters,
            pflops=np.array([each.pflops]),
            pixels=np.array([each.pixels]),
            loss=np.array([each.loss]),
            smoothed=np.array([each.loss]),
            learning_rate=np.array([0.0 if each.annealed else 1e-3]),
            annealed=np.array([each.annealed]),
        )
        for each in observations
    ]
    return Study("eval/loss", 0.013, curves, list(observations), [])


def ladder(noise: float = 0.003, seeds: int = 1, sizes: Sequence[float] = SIZES, amounts: Sequence[float] = AMOUNTS):
    """Trainings on the joint surface: every size on every amount of data with every seed."""
    generator = np.random.default_rng(7)
    return [
        training(size, pixels, joint_surface(size, pixels) * np.exp(noise * generator.standard_normal()), seed=seed)
        for size, pixels, seed in product(sizes, amounts, range(seeds))
    ]
