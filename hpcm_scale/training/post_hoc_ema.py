"""Post-hoc EMA: an EMA of a length that is chosen after training (arXiv 2312.02696, section 3.2).

Every checkpoint holds EMAs of the configured lengths. A weighted sum of all of them approximates the profile of any
other length by least squares.
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
from hpcm_scale.config.schema import RunConfig
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.errors import UserError
from hpcm_scale.formatting import counted
from hpcm_scale.tracking.progress import progress
from hpcm_scale.training.checkpoints import Checkpoint
from hpcm_scale.training.costs import costs_by_phase
from hpcm_scale.training.ema import exponent
from hpcm_scale.training.run_folder import RunFolder
from hpcm_scale.training.start import origin_weights, receivers_of
from hpcm_scale.training.state_shards import StateShard, StoredState, ema_kind, open_state
from hpcm_scale.training.task import Task, task_of

MAX_ERROR = 0.05
"""Largest distance from the requested profile, relative to its norm."""
_CELLS = 8192
"""Number of intervals of the training over which profiles are compared."""


class Profile(NamedTuple):
    """Weights of an EMA on the first `updates` steps."""

    length: float
    """Standard deviation, relative to `updates`."""
    updates: int


class PostHocEMA(NamedTuple):
    """An EMA of a length that the run did not keep."""

    task: Task
    """Its module, on the CPU, has the EMA as weights."""
    step: int
    spent: dict[str, Any]
    """Steps, images and PFLOPs up to that step, and the sources of the EMA."""
    origin: dict[str, Any] | None
    """The weights that the run started from (`task.origin_of`)."""
    lengths: list[float]
    """Lengths of the stored EMAs that it combines."""
    steps: list[int]
    """Steps of their checkpoints."""
    error: float
    """Distance of its profile from the requested one, relative to its norm."""
    damaged: list[str]
    """Damaged checkpoints, which are not used, and how they are damaged."""


def post_hoc_ema(run: str | Path, length: float, at: int | None = None) -> PostHocEMA:
    """The EMA of `length` over a run up to the checkpoint of step `at`, by default the newest.

    Takes memory for the model and three of its largest tensors. Raises UserError if the run has no EMAs, has too few
    checkpoints, or removes one of them meanwhile.
    """
    folder = RunFolder(run)
    if not folder.config_file.is_file():
        raise UserError("no-run-to-average", "", f"{run} is not a run; give a run folder")
    config = from_yaml(folder.config_file)
    if not config.train.ema:
        raise UserError("no-ema", "train.ema", f"{run} has no EMAs of its weights; train with train.ema=[0.05,0.1]")
    snapshots, damaged = _snapshots(folder, config.run, at)
    stored = [Profile(each, updates) for _, updates in snapshots for each in config.train.ema]
    shares, error = coefficients(stored, Profile(length, snapshots[-1][1]))
    if error > MAX_ERROR:
        raise UserError(
            "profile-out-of-reach",
            "--length",
            f"the EMAs of length {' and '.join(map(str, config.train.ema))} in "
            f"{counted(len(snapshots), 'checkpoint')} approximate --length {length:g} only within {error:.0%}; choose "
            "a length closer to theirs, or keep more checkpoints (train.checkpoint_every, train.keep_every)",
        )
    receivers = receivers_of(config)
    task = task_of(config, origin_weights(config, folder) if config.machine.freeze_codec else None, receivers)
    checkpoints = [checkpoint for checkpoint, _ in snapshots]
    _load(task, checkpoints, config.train.ema, shares.reshape(len(snapshots), -1))
    steps = [checkpoint.step for checkpoint in checkpoints]
    images = checkpoints[-1].read()[1]["tracker"]["images"]
    phases = RunSpec.of(config, 1).phases
    by_phase = costs_by_phase(phases, config.model, config.machine, config.optimizer, receivers)
    costs = {image: each.training_flops_per_image for image, each in by_phase.items()}
    sources = {"lengths": config.train.ema, "steps": steps, "error": error}
    spent = {"step": steps[-1], "images": images, "pflops": flops_of(costs, images) / PETA}
    spent |= {"ema": length, "ema_from": sources}
    origin = folder.origin(config.run.cooldown_of)
    return PostHocEMA(task, steps[-1], spent, origin, config.train.ema, steps, error, damaged)


def save(path: Path, ema: PostHocEMA) -> None:
    """Write the weights for use; their metadata name the sources of the EMA."""
    state = {name: parameter.detach() for name, parameter in ema.task.module.named_parameters()}
    ema.task.save(path, state, ema.spent, ema.origin)


def coefficients(stored: Sequence[Profile], target: Profile) -> tuple[np.ndarray, float]:
    """Least-squares coefficients of stored EMAs for a target profile (arXiv 2312.02696, equation 17).

    Unlike there, the coefficients sum to exactly 1, so that weights that do not change during training are not scaled.
    Profiles are compared as weights on steps, which is better conditioned than inner products of continuous profiles.

    Returns:
        The coefficients, float64 (n,), and the distance of their sum from the target, relative to its norm.
    """
    last = target.updates
    even = np.linspace(0, last, min(last, _CELLS) + 1).round()
    edges = np.union1d(even, [profile.updates for profile in stored])

    def density(profile: Profile) -> np.ndarray:
        """Weight in each interval, scaled so that its squares sum to the integral of the squared profile."""
        below = np.minimum(edges / profile.updates, 1) ** (exponent(profile.length) + 1)
        return np.diff(below) / np.sqrt(np.diff(edges))

    goal, columns = density(target), np.stack([density(profile) for profile in stored], axis=1)
    nearest = np.argmin(np.linalg.norm(columns - goal[:, None], axis=0))
    base = columns[:, [nearest]]
    shares = np.linalg.lstsq(columns - base, goal - base[:, 0], rcond=None)[0]
    shares[nearest] = 0
    shares[nearest] = 1 - shares.sum()
    return shares, float(np.linalg.norm(columns @ shares - goal) / np.linalg.norm(goal))


def _snapshots(folder: RunFolder, run: RunConfig, at: int | None) -> tuple[list[tuple[Checkpoint, int]], list[str]]:
    """Valid checkpoints up to step `at` with their numbers of updates, oldest first, and the damage of the others.

    For a cooldown they include the checkpoints of the constant-rate run before it.
    """
    if at is not None and folder.checkpoints.at(at) is None:
        steps = ", ".join(map(str, folder.checkpoints.steps())) or "none yet"
        raise UserError(
            "no-checkpoint-at-step",
            "--at",
            f"{folder.path} has no checkpoint of step {at}; choose one of: {steps}",
        )
    found = [checkpoint for checkpoint in folder.checkpoints.complete() if at is None or checkpoint.step <= at]
    while run.cooldown_of is not None and run.cooldown_at is not None:
        parent, step = RunFolder(run.cooldown_of), run.cooldown_at
        if not parent.config_file.is_file():
            raise UserError(
                "constant-rate-run-missing",
                "run.cooldown_of",
                f"{parent.path}, from which {folder.path} started its cooldown, is missing; restore it",
            )
        before = [checkpoint for checkpoint in parent.checkpoints.complete() if checkpoint.step <= step]
        found = [*before, *(checkpoint for checkpoint in found if checkpoint.step > step)]
        run = from_yaml(parent.config_file).run
    flaws = {checkpoint: checkpoint.flaw() for checkpoint in found}
    whole = [(checkpoint, checkpoint.read()[1]["updates"]) for checkpoint, flaw in flaws.items() if not flaw]
    snapshots = [(checkpoint, updates) for checkpoint, updates in whole if updates]
    if not snapshots:
        raise UserError(
            "no-checkpoint-yet", "", f"{folder.path} has no checkpoint after step 0 yet; wait for the first"
        )
    return snapshots, [f"{checkpoint.folder}: {flaw}" for checkpoint, flaw in flaws.items() if flaw]


def _load(task: Task, checkpoints: Sequence[Checkpoint], lengths: Sequence[float], shares: np.ndarray) -> None:
    """Load the sum of the stored EMAs, times their `shares` (checkpoints, lengths), into the task's module."""
    parameters = list(task.module.named_parameters())
    try:
        with ExitStack() as stack, torch.no_grad():
            stored = [
                stack.enter_context(open_state([checkpoint.folder / name for name in checkpoint.read()[0]]))
                for checkpoint in checkpoints
            ]
            for name, parameter in progress(parameters, description="EMA", unit="tensor"):
                parameter.copy_(_sum(name, parameter.numel(), stored, lengths, shares).view_as(parameter))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            "unreadable-checkpoints",
            "",
            f"cannot read checkpoints in {checkpoints[-1].folder.parent} ({error}); if the run is training, try again",
        ) from error


def _sum(
    name: str, size: int, stored: Sequence[StoredState], lengths: Sequence[float], shares: np.ndarray
) -> torch.Tensor:
    """The weighted sum of one flattened tensor, float64 (size,)."""
    total, values = torch.zeros(size, dtype=torch.float64), torch.empty(size)
    for state, of_checkpoint in zip(stored, shares.tolist(), strict=True):
        for length, share in zip(lengths, of_checkpoint, strict=True):
            state(StateShard(ema_kind(length), name, 0, values))
            total.add_(values, alpha=share)
    return total
