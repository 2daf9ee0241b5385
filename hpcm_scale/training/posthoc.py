"""Averages of the weights of a length that is chosen after training (arXiv 2312.02696, section 3.2).

Every checkpoint holds averages of the lengths kept; a weighted sum of all of these whose profile is nearest to the
wanted one, by least squares, stands for the average that was not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError

from hpcm_scale.compute.tracker import PETA, flops_of
from hpcm_scale.config.compose import from_yaml
from hpcm_scale.config.schema import Config
from hpcm_scale.errors import UserError
from hpcm_scale.tracking.progress import progress
from hpcm_scale.training.averages import exponent, kind_of
from hpcm_scale.training.checkpoints import Checkpoint
from hpcm_scale.training.costs import costs_by_phase
from hpcm_scale.training.run_folder import RunFolder
from hpcm_scale.training.start import origin_weights, receivers_of
from hpcm_scale.training.state_shards import Piece, Stored, opened
from hpcm_scale.training.task import Task, task_of

WORST = 0.05
"""Profiles that are further than this from the wanted one, relative to it, are no average of that length."""
_CELLS = 8192
"""The training is cut into at most so many parts to compare profiles over it."""


class Profile(NamedTuple):
    """How an average weighs the weights after each of the first `updates` steps."""

    length: float
    """Standard deviation, relative to `updates`."""
    updates: int


class Average(NamedTuple):
    """An average of a length that was not kept."""

    task: Task
    """Its module, on the CPU, has the average for weights."""
    step: int
    spent: dict[str, Any]
    """Steps, images and PFLOPs up to there, and what the average is made of."""
    origin: dict[str, Any] | None
    """What the run started from (`task.origin_of`)."""
    lengths: list[float]
    """Of the averages that it is made of."""
    steps: list[int]
    """Of their checkpoints."""
    error: float
    """Distance of its profile from the wanted one, relative to that."""
    damaged: list[str]
    """Checkpoints that were passed over, and what is wrong with them."""


def average(run: str | Path, length: float, at: int | None = None) -> Average:
    """The average of `length`, within `AVERAGE`, over a run up to the checkpoint of step `at`, by default its newest.

    Takes memory for the model and three of its largest tensors. Raises UserError if the run has kept no averages, if
    its checkpoints are too few, or one of them vanishes meanwhile.
    """
    folder = RunFolder(run)
    if not folder.config_file.is_file():
        raise UserError(f"{run} is not a run; name a run folder")
    config = from_yaml(folder.config_file)
    if not config.train.ema:
        raise UserError(f"{run} has kept no averages of its weights; train with train.ema=[0.05,0.1] to have some")
    snapshots, damaged = _snapshots(folder, config, at)
    kept = [Profile(each, updates) for _, updates in snapshots for each in config.train.ema]
    wanted = Profile(length, snapshots[-1][1])
    shares, error = coefficients(kept, wanted)
    if error > WORST:
        raise UserError(
            f"the averages of length {' and '.join(map(str, config.train.ema))} in {counted(len(snapshots))} come only "
            f"within {error:.0%} of the profile of --length {length:g}; choose one nearer to them, or train with more "
            "checkpoints that stay (train.checkpoint_every, train.keep_every)"
        )
    receivers = receivers_of(config)
    task = task_of(config, origin_weights(config, folder) if config.machine.freeze_codec else None, receivers)
    checkpoints = [checkpoint for checkpoint, _ in snapshots]
    _fill(task, checkpoints, config.train.ema, shares.reshape(len(snapshots), -1))
    steps = [checkpoint.step for checkpoint in checkpoints]
    images = checkpoints[-1].read()[1]["tracker"]["images"]
    costs = {image: costs.training_flops_per_image for image, costs in costs_by_phase(config, receivers).items()}
    made = {"lengths": config.train.ema, "steps": steps, "error": error}
    spent = {"step": steps[-1], "images": images, "pflops": flops_of(costs, images) / PETA}
    spent |= {"ema": length, "ema_from": made}
    return Average(task, steps[-1], spent, folder.origin(config), config.train.ema, steps, error, damaged)


def save(path: Path, average: Average) -> None:
    """Write the weights for use, with what they were made of among their facts."""
    state = {name: parameter.detach() for name, parameter in average.task.module.named_parameters()}
    average.task.save(path, state, average.spent, average.origin)


def coefficients(kept: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """What to multiply averages with profiles `kept` with, float64 (n,), so that their sum is nearest to one with the
    profile `wanted`, and how far it is from it, relative to it (least squares: the same, equation 17).

    Unlike there, the coefficients sum to 1 exactly: what of the weights does not change over the training, most of
    them, is not off by a factor. And profiles are compared as what they are, weights on steps, rather than through
    inner products of continuous ones, whose matrix is the worse conditioned.
    """
    last = wanted.updates
    even = np.linspace(0, last, min(last, _CELLS) + 1).round()
    edges = np.union1d(even, [profile.updates for profile in kept])

    def density(profile: Profile) -> np.ndarray:
        """Weight in each cell, such that squares add up to the integral of the squared profile."""
        below = np.minimum(edges / profile.updates, 1) ** (exponent(profile.length) + 1)
        return np.diff(below) / np.sqrt(np.diff(edges))

    target, columns = density(wanted), np.stack([density(profile) for profile in kept], axis=1)
    nearest = np.argmin(np.linalg.norm(columns - target[:, None], axis=0))
    rest = columns[:, [nearest]]
    shares = np.linalg.lstsq(columns - rest, target - rest[:, 0], rcond=None)[0]
    shares[nearest] = 0
    shares[nearest] = 1 - shares.sum()
    return shares, float(np.linalg.norm(columns @ shares - target) / np.linalg.norm(target))


def counted(checkpoints: int) -> str:
    """So many checkpoints, in words."""
    return f"{checkpoints} checkpoint{'s' * (checkpoints != 1)}"


def _snapshots(folder: RunFolder, config: Config, at: int | None) -> tuple[list[tuple[Checkpoint, int]], list[str]]:
    """The whole checkpoints up to step `at`, those of the trunks that the run branched off included, oldest first,
    each with how many steps had changed the weights; and what is wrong with the others."""
    if at is not None and folder.checkpoints.at(at) is None:
        steps = ", ".join(map(str, folder.checkpoints.steps())) or "none yet"
        raise UserError(f"{folder.path} holds no checkpoint of step {at} (there are: {steps}); choose one of these")
    found = [checkpoint for checkpoint in folder.checkpoints.complete() if at is None or checkpoint.step <= at]
    while config.run.cooldown_of:
        trunk, step = RunFolder(config.run.cooldown_of), config.run.cooldown_at
        if not trunk.config_file.is_file():
            raise UserError(f"{trunk.path}, which {folder.path} branched off, is not there; put it back")
        before = [checkpoint for checkpoint in trunk.checkpoints.complete() if checkpoint.step <= step]
        found = [*before, *(checkpoint for checkpoint in found if checkpoint.step > step)]
        config = from_yaml(trunk.config_file)
    flaws = {checkpoint: checkpoint.flaw() for checkpoint in found}
    whole = [(checkpoint, checkpoint.read()[1]["updates"]) for checkpoint, flaw in flaws.items() if not flaw]
    snapshots = [(checkpoint, updates) for checkpoint, updates in whole if updates]
    if not snapshots:
        raise UserError(f"{folder.path} holds no checkpoint after a step yet; wait for one")
    return snapshots, [f"{checkpoint.folder}: {flaw}" for checkpoint, flaw in flaws.items() if flaw]


def _fill(task: Task, checkpoints: Sequence[Checkpoint], lengths: Sequence[float], shares: np.ndarray) -> None:
    """Give the task's module the sum of the averages in the checkpoints, (n,), times their `shares` (n, lengths)."""
    parameters = list(task.module.named_parameters())
    try:
        with ExitStack() as stack, torch.no_grad():
            stored = [
                stack.enter_context(opened([checkpoint.folder / name for name in checkpoint.read()[0]]))
                for checkpoint in checkpoints
            ]
            for name, parameter in progress(parameters, description="average", unit="tensor"):
                parameter.copy_(_sum(name, parameter.numel(), stored, lengths, shares).view_as(parameter))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the checkpoints in {checkpoints[-1].folder.parent} cannot be read ({error}); if the run is training, try "
            "again"
        ) from error


def _sum(name: str, size: int, stored: Sequence[Stored], lengths: Sequence[float], shares: np.ndarray) -> torch.Tensor:
    """One flattened tensor of it, float64 (size,)."""
    total, values = torch.zeros(size, dtype=torch.float64), torch.empty(size)
    for pieces, of_checkpoint in zip(stored, shares.tolist(), strict=True):
        for length, share in zip(lengths, of_checkpoint, strict=True):
            pieces.fill(Piece(kind_of(length), name, 0, values))
            total.add_(values, alpha=share)
    return total
