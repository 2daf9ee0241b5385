"""Command: train one configuration, or several, one after the other, with -m.

deepspeed --num_gpus 8 --module hpcm_scale.train model=1b engine=zero3 data.shards=shards
"""

from __future__ import annotations

import os
import sys

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from hpcm_scale.config.compose import CONFIG_NAME, check_overrides, config_folder, translated, typed
from hpcm_scale.config.schema import Config
from hpcm_scale.config.sweeps import name_run
from hpcm_scale.errors import UserError, one_line
from hpcm_scale.training.processes import without_launcher_arguments


@one_line
def main() -> None:
    """Entry point of `hpcm train` and `python -m hpcm_scale.train`."""
    arguments = without_launcher_arguments(sys.argv[1:])
    check_overrides(get_args_parser().parse_args(arguments).overrides)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us, not to the terminal
    sys.argv = [sys.argv[0], *arguments]
    errors: list[UserError] = []

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=CONFIG_NAME)
    def job(composed: DictConfig) -> None:
        try:
            _run(composed)
        except UserError as error:  # kept from Hydra, which would print more than its one line
            errors.append(error)

    translated(job)
    if errors:
        raise errors[0]


def _run(composed: DictConfig) -> None:
    config: Config = typed(composed)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        name_run(config, list(HydraConfig.get().overrides.task), sys.argv[1:])
    from hpcm_scale.training.run import run  # after the arguments: torch takes seconds to import

    run(config)


if __name__ == "__main__":
    main()
