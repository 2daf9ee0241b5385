"""Command: train one configuration, or several with -m.

deepspeed --num_gpus 8 --module hpcm_scale.train model=1b engine=zero3 data.shards=shards
python -m hpcm_scale.train -m model=68m,120m,246m hydra/launcher=deepspeed hydra.launcher.gpus_per_job=4 …
"""

from __future__ import annotations

import os
import sys
from functools import partial

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from hpcm_scale.config.compose import CONFIG_NAME, check_overrides, config_folder, translated, typed
from hpcm_scale.config.schema import Config
from hpcm_scale.config.sweeps import refuse_hydra_folders
from hpcm_scale.distributed.processes import without_launcher_arguments
from hpcm_scale.errors import STOPPED, Parser, UserError, entry_point, ignore_lost_output
from hpcm_scale.model.ladder import with_size
from hpcm_scale.sweeps import launchers  # noqa: F401 (registers with Hydra)

_OPTIONS = ("resolve", "cfg", "info", "shell_completion", "run", "experimental_rerun")
"""Hydra's own that exclude each other, or name a file."""


@entry_point
@ignore_lost_output()
def main() -> None:
    """Entry point of `hpcm train` and `python -m hpcm_scale.train`."""
    sys.argv[1:] = without_launcher_arguments(sys.argv[1:])
    parser = get_args_parser()
    parser.error = partial(Parser.error, parser)
    chosen = parser.parse_args()
    check_overrides(chosen.overrides)
    refuse_hydra_folders(chosen.overrides)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
    composed: list[Config] = []
    errors: list[UserError] = []

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=CONFIG_NAME)
    def job(configuration: DictConfig) -> None:
        """Keep the configuration of a single run, which is trained after Hydra has returned."""
        settings = HydraConfig.get()
        launcher = f"hydra/launcher={settings.runtime.choices['hydra/launcher']}"
        try:
            if settings.mode == RunMode.MULTIRUN:
                raise UserError(
                    "foreign-launcher",
                    "hydra/launcher",
                    f"{launcher} cannot start training; omit it, or use hydra/launcher=deepspeed or slurm",
                )
            if launcher != "hydra/launcher=in_turn":
                raise UserError(
                    "launcher-for-one-run", "hydra/launcher", "hydra/launcher is for multiruns; add -m, or omit it"
                )
            composed.append(typed(with_size(configuration)))
        except UserError as error:  # Hydra would print a line of its own
            errors.append(error)

    try:
        translated(job)
    except ValueError as error:
        if not any(getattr(chosen, option) for option in _OPTIONS):  # of a training
            raise
        parser.error(str(error))
    if errors:
        raise errors[0]
    if not composed:
        return  # a launcher has trained all runs, or the arguments ask for help
    from hpcm_scale.training.run import run  # after the arguments: torch takes seconds to import

    if not run(composed[0]).done:
        raise SystemExit(STOPPED)


if __name__ == "__main__":
    main()
