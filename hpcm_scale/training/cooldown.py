"""Branches: from a checkpoint of a trunk, the learning rate decays to zero, so that one trunk gives several annealed
models (arXiv 2405.18392)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from hpcm_scale.config.compose import check_overrides, from_yaml, translated
from hpcm_scale.config.phases import crop_starts
from hpcm_scale.config.schema import Config
from hpcm_scale.errors import UserError
from hpcm_scale.limits import PART
from hpcm_scale.training.run_folder import RunFolder


def trunks(paths: Sequence[str]) -> list[Path]:
    """The folders among `paths` but for branches, each once: so a pattern such as `runs/ladder/*`, which also takes in
    other files and earlier branches, names the trunks. Raises UserError if there is none."""
    folders = [path for path in dict.fromkeys(map(Path, paths)) if not path.is_file()]
    found = [folder for folder in folders if not _is_branch(RunFolder(folder).config_file)]
    if not found:
        raise UserError(f"no trunk among {' '.join(paths)}: only branches or files; name the run folder of a trunk")
    return found


def _is_branch(config: Path) -> bool:
    return config.is_file() and from_yaml(config).run.cooldown_of is not None


def branch(trunk: str | Path, at: int, decay: float, changes: Sequence[str] = ()) -> Config:
    """The configuration of the branch off `trunk` at step `at` whose last part `decay`, a fraction of all its steps
    (those of the trunk included), anneals.

    Its folder lies beside the trunk's. `changes` are `key=value` of what may differ between starts of one run, such
    as `log.wandb=disabled`. Raises UserError if the trunk has no checkpoint of that step or decays before it.
    """
    PART.check("--decay", decay)
    trunk = Path(trunk).resolve() if Path(trunk).name in ("", "..") else Path(trunk)
    folder = RunFolder(trunk)
    folder.branch_point(at)
    steps = round(at / (1 - decay))
    if steps - at < 2:
        raise UserError(f"--decay {decay:g} at step {at} is a decay of {steps - at} steps; give a larger part")
    config = from_yaml(folder.config_file)
    boundaries = config.schedule.boundaries
    if boundaries and boundaries[-1] <= 1:  # the trunk's drops stay at the trunk's steps
        config.schedule.boundaries = [max(boundary * config.train.steps, 2.0) for boundary in boundaries]
    config.schedule.crop_boundaries = [float(step) for step in crop_starts(config)]  # so do its crops
    config.schedule.decay = float(steps - at)
    config.train.steps = steps
    config.train.stop_after = None
    config.train.keep_at, config.train.profile_steps = [], []
    config.run.cooldown_of, config.run.cooldown_at = str(trunk), at
    config.run.dir = str(trunk.parent / f"{trunk.name},cooldown_at={at},decay={decay:g}")
    check_overrides(changes)
    for change in changes:
        config = _changed(config, change)
    return config


def _changed(config: Config, change: str) -> Config:
    structured = OmegaConf.structured(config)
    try:
        return translated(lambda: OmegaConf.to_object(OmegaConf.merge(structured, OmegaConf.from_dotlist([change]))))
    except UserError as error:
        raise UserError(f"cannot set {change} ({error}); give a value of the key's type") from error
