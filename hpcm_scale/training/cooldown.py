"""Cooldowns: from a checkpoint of a constant-rate run the learning rate decays to zero, so that one constant-rate run
gives several annealed models (arXiv 2405.18392)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from hpcm_scale.config.compose import check_overrides, from_yaml, translated
from hpcm_scale.config.schema import Config
from hpcm_scale.config.spec import crop_starts
from hpcm_scale.errors import UserError
from hpcm_scale.limits import PART
from hpcm_scale.training.run_folder import RunFolder


def constant_rate_runs(paths: Sequence[str]) -> list[Path]:
    """The folders among `paths` that are no cooldowns, each once; so a pattern such as `runs/ladder/*` can be given.

    Raises UserError if there is none.
    """
    found = []
    for folder in dict.fromkeys(map(Path, paths)):
        config = RunFolder(folder).config_file
        if not folder.is_file() and not (config.is_file() and from_yaml(config).run.cooldown_of):
            found.append(folder)
    if not found:
        raise UserError(
            "only-cooldowns",
            "RUN",
            f"{' '.join(paths)} contains only cooldowns or files; give the run folder of a constant-rate run",
        )
    return found


def cooldown(run: str | Path, at: int, decay: float, changes: Sequence[str] = ()) -> Config:
    """The configuration of the cooldown of `run` from step `at`; its run folder is beside that of `run`.

    `decay`: length of the decay as a fraction of all steps, those of `run` included. `changes`: `key=value` of keys
    that may change between two starts of a run, such as `log.wandb=disabled`. Raises UserError if `run` has no
    checkpoint of that step, or decays before it.
    """
    PART.check("--decay", decay)
    run = Path(run).resolve() if Path(run).name in ("", "..") else Path(run)
    folder = RunFolder(run)
    folder.cooldown_point(at)
    steps = round(at / (1 - decay))
    if steps - at < 2:
        raise UserError(
            "decay-too-short",
            "--decay",
            f"--decay {decay:g} at step {at} is a decay of {steps - at} steps; give a larger fraction",
        )
    config = from_yaml(folder.config_file)
    # Boundaries in fractions of the run become the steps that they were.
    boundaries = config.schedule.boundaries
    if boundaries and boundaries[-1] <= 1:
        config.schedule.boundaries = [max(boundary * config.train.steps, 2.0) for boundary in boundaries]
    config.schedule.crop_boundaries = [float(step) for step in crop_starts(config.schedule, config.train.steps)]
    config.schedule.decay = float(steps - at)
    config.train.steps = steps
    config.train.stop_after = None
    config.train.keep_at, config.train.profile_steps = [], []
    config.run.cooldown_of, config.run.cooldown_at = str(run), at
    config.run.dir = str(run.parent / f"{run.name},cooldown_at={at},decay={decay:g}")
    check_overrides(changes)
    settings = OmegaConf.structured(config)
    for change in changes:
        settings = _changed(settings, change)
    return cast(Config, OmegaConf.to_object(settings))


def _changed(settings: Any, change: str) -> Any:
    try:
        return translated(lambda: OmegaConf.merge(settings, OmegaConf.from_dotlist([change])))
    except UserError as error:
        raise UserError(
            "cooldown-change", change.partition("=")[0], f"cannot set {change} ({error}); give a value of its type"
        ) from error
