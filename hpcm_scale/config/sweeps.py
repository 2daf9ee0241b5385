"""Names for the runs of a multirun."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser

from hpcm_scale.config.schema import Config
from hpcm_scale.errors import UserError

LONGEST_NAME = 200
"""Bytes of a name that is made here. File systems allow 255; the names of the files beside a run folder are longer."""
_HYDRA_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")


def name_run(config: Config, job: Sequence[str], swept: Sequence[str]) -> None:
    """Give a job of a multirun its sweep and its folder, unless the user named them.

    `job` are the overrides of this job, `swept` the keys that set the jobs apart (`swept_keys`). The sweep is
    named after these keys, the run after their values: runs/sweep_model/model=nano. A name that is no file name, for
    its slashes or its length, is changed into one and gets a hash, so that different names stay different.
    """
    if not swept:
        return  # one job alone is a run like any other
    config.run.sweep = config.run.sweep or _file_name("sweep_" + "_".join(key.replace("/", ".") for key in swept))
    chosen = [override for override in job if override.split("=")[0].lstrip("+") in swept]
    if config.run.dir is None:
        config.run.dir = str(sweep_folder(config.run.sweep) / _file_name(",".join(chosen)))


def sweep_folder(sweep: str) -> Path:
    """The folder that holds the runs of a sweep."""
    return Path("runs") / sweep


def _file_name(text: str) -> str:
    name = text.replace("/", "_")
    if name == text and len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    mark = "-" + sha256(os.fsencode(text)).hexdigest()[:8]
    return os.fsencode(name)[: LONGEST_NAME - len(mark)].decode(errors="ignore") + mark


def swept_keys(arguments: Sequence[str], grids: Iterable[Mapping[str, object]] = ()) -> list[str]:
    """The keys that set the jobs of a multirun apart.

    They are those of the sweeper's own `grids` (`sweeper_grids`), also where the command line then names a
    single value: a run is in the same folder whether it is trained with the others or alone; and those that
    the command line `arguments` give several values.
    """
    keys = dict.fromkeys(key for grid in grids for key in grid)
    overrides = [argument for argument in arguments if not argument.startswith(("-", "hydra.", "hydra/"))]
    parsed = OverridesParser.create().parse_overrides(overrides)
    return list(keys | dict.fromkeys(override.key_or_group for override in parsed if override.is_sweep_override()))


def sweeper_grids(sweeper: Mapping[str, object]) -> list[Mapping[str, object]]:
    """What `hydra.sweeper` sweeps over by itself: its `params`, then its `grids` where it has some."""
    return [sweeper.get("params") or {}, *(sweeper.get("grids") or [])]


def refuse_hydra_folders(overrides: Sequence[str]) -> None:
    """Raise UserError for Hydra's own keys of folders, which have no effect here."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group in _HYDRA_FOLDERS:
            raise UserError(
                f"{override.input_line} has no effect; run.dir=DIR is the folder of a run, and run.sweep=NAME puts the "
                "runs of a sweep into runs/NAME"
            )


def quoted(value: str) -> str:
    """A text as Hydra's grammar reads it back, whatever its characters."""
    value = re.sub(r'(\\*)"', r'\1\1\\"', value)
    value = re.sub(r"(\\+)$", r"\1\1", value)
    return '"' + value.replace("${", r"\${") + '"'
