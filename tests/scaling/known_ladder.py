"""A ladder of run folders whose loss surface is known: L = E + A·N^−α + B·D^−β, D in pixels."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from hpcm_scale.config.compose import compose, to_dict
from hpcm_scale.model.parameters import on_meta, parameter_count

SURFACE = {"E": 0.9, "A": 24.0, "alpha": 0.33, "B": 5.0e3, "beta": 0.45}
SIZES = ("nano", "450k", "micro", "2m", "mini", "small")
COST = {"k": 0.2, "kappa": 0.946}
CROP, BATCH, LMBDA = 256, 8, 0.013
UNANNEALED = 0.08
"""Relative loss that a learning rate at its peak costs."""


def surface(parameters: float, pixels: np.ndarray | float) -> np.ndarray | float:
    """The annealed loss of so many parameters after so many pixels."""
    floor, a, alpha, b, beta = SURFACE.values()
    return floor + a * parameters**-alpha + b * pixels**-beta


@cache
def composed(model: str) -> dict:
    """The configuration of a run of this preset at a constant learning rate."""
    return to_dict(compose([f"model={model}", "schedule=constant"]))


@cache
def cost(model: str) -> tuple[int, int]:
    """Parameters, and FLOPs of training on one crop: k·N^κ a pixel, much as this family has it."""
    parameters = parameter_count(on_meta(compose([f"model={model}"]).model))
    return parameters, round(COST["k"] * parameters ** COST["kappa"]) * CROP**2


def write_run(
    folder: Path,
    model: str,
    steps: int,
    *,
    noise: float = 0.004,
    seed: int = 0,
    decay: float = 0.0,
    branch: tuple[Path, int] | None = None,
    done: int | None = None,
    evaluate_every: int = 50,
) -> Path:
    """A run folder as training leaves it: constant learning rate, its last `decay` (0 to 1) falling as 1 − √.

    A branch, (trunk, step), begins after that step. Evaluation losses scatter by the standard deviation
    `noise` about the surface, relatively; training losses by 5 %. `done`: so many steps until now.
    """
    parameters, flops = cost(model)
    generator = np.random.default_rng([seed, steps, parameters])
    config = deepcopy(composed(model))
    config["train"] |= {"steps": steps, "batch_size": BATCH, "seed": seed}
    config["objective"]["lmbda"] = LMBDA
    config["schedule"] |= {"learning_rate": 1e-3, "decay": decay}
    config["data"]["shards"], config["eval"]["images"] = "/data/photos/shards", "/data/kodak"
    config["run"] |= {"dir": str(folder), "sweep": "ladder", "cooldown_of": None, "cooldown_at": None}
    first = 0
    if branch:
        config["run"] |= {"cooldown_of": str(branch[0]), "cooldown_at": branch[1]}
        first = branch[1]
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    lines = []
    for step in range(first + 1, (done or steps) + 1):
        images = step * BATCH
        axes = {"step": step, "time": step / 4, "train/images": images, "compute/pflops": images * flops / 1e15}
        since = (step - 1 - steps * (1 - decay)) / (steps * decay) if decay else 0.0
        factor = 1 - max(since, 0.0) ** 0.5
        loss = surface(parameters, images * CROP**2) * (1 + UNANNEALED * factor)
        if step % 2 == 0 or step == steps:
            training = {"train/loss": loss * np.exp(0.05 * generator.standard_normal()), "train/skipped": 0}
            speed = {"perf/step_seconds": 0.25, "train/learning_rate": 1e-3 * factor, "train/grad_norm": 1.5}
            lines.append(axes | training | speed)
        if step % evaluate_every == 0 or step == steps:
            measured = loss * np.exp(noise * generator.standard_normal())
            lines.append(axes | {"eval/loss": measured, "eval/bpp": 0.3 * measured, "eval/psnr": 34 - 3 * measured})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_ladder(folder: Path, sizes: tuple[str, ...] = SIZES, noise: float = 0.004) -> Path:
    """Of each size a trunk of 1,000 steps at a constant rate, and branches that decay from 200, 400 and 800."""
    for model in sizes:
        trunk = write_run(folder / model, model, 1000, noise=noise)
        for at in (200, 400, 800):
            steps = round(at / 0.8)
            write_run(folder / f"{model}-at-{at}", model, steps, noise=noise, decay=0.2, branch=(trunk, at))
    return folder
