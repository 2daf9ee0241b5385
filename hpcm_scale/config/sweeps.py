"""Names of the runs of a multirun."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from hpcm_scale.config.schema import RunConfig
from hpcm_scale.errors import UserError

LONGEST_NAME = 200
"""Bytes of a generated name. File systems allow 255; the names of the files beside a run folder are longer."""
_HYDRA_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")


def name_run(run: RunConfig, job: Sequence[str], swept: Sequence[str]) -> None:
    """Set `run.sweep` and `run.dir` of a job of a multirun, unless the user set them.

    `job` are the overrides of this job, `swept` the keys that differ between jobs (`swept_keys`). The sweep is named
    after these keys, the run after their values: runs/sweep_model/model=nano. A name that is no valid file name, for
    its slashes or its length, is changed into one and gets a hash, so that different names stay different.
    """
    if not swept:
        return  # a single job is a run like any other
    run.sweep = run.sweep or _file_name("sweep_" + "_".join(key.replace("/", ".") for key in swept))
    chosen = [override for override in job if override.split("=")[0].lstrip("+") in swept]
    if run.dir is None:
        run.dir = str(sweep_folder(run.sweep) / _file_name(",".join(chosen)))


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
    """The keys that differ between the jobs of a multirun.

    They are the keys of the sweeper's own `grids` (`sweeper_grids`) and those with several values in the command line
    `arguments`. A key of a grid counts even if the command line gives it a single value: a run has the same folder
    whether it is trained with the others or separately.
    """
    keys = dict.fromkeys(key for grid in grids for key in grid)
    overrides = [argument for argument in arguments if not argument.startswith(("-", "hydra.", "hydra/"))]
    parsed = OverridesParser.create().parse_overrides(overrides)
    return list(keys | dict.fromkeys(override.key_or_group for override in parsed if override.is_sweep_override()))


def sweeper_grids(sweeper: Mapping[str, Any]) -> list[Mapping[str, object]]:
    """The `params` and `grids` of `hydra.sweeper`."""
    return [sweeper.get("params") or {}, *(sweeper.get("grids") or [])]


def refuse_hydra_folders(overrides: Sequence[str]) -> None:
    """Raise UserError for Hydra's own keys of folders, which have no effect here."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group in _HYDRA_FOLDERS:
            raise UserError(
                "hydra-folder",
                override.key_or_group,
                f"{override.input_line} has no effect; set run.dir=DIR, the run folder, or run.sweep=NAME, which "
                "writes the runs of a sweep to runs/NAME",
            )


def quoted(value: str) -> str:
    """A text as Hydra's grammar parses it, with any characters."""
    value = re.sub(r'(\\*)"', r'\1\1\\"', value)
    value = re.sub(r"(\\+)$", r"\1\1", value)
    return '"' + value.replace("${", r"\${") + '"'
