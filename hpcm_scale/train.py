"""Command: train one configuration, or several with -m.

deepspeed --num_gpus 8 --module hpcm_scale.train model=1b engine=zero3 data.shards=shards
python -m hpcm_scale.train -m model=68m,120m,246m hydra/launcher=deepspeed hydra.launcher.gpus_per_job=4 …
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial

import hydra
from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from hpcm_scale.config.compose import CONFIG_NAME, check_overrides, config_folder, translated, typed
from hpcm_scale.config.schema import Config
from hpcm_scale.config.sweeps import quoted, refuse_hydra_folders, sweeper_grids, swept_keys
from hpcm_scale.distributed.processes import without_launcher_arguments
from hpcm_scale.errors import STOPPED, Parser, UserError, entry_point, ignore_lost_output
from hpcm_scale.model.ladder import with_size
from hpcm_scale.sweeps import launchers  # noqa: F401 (registers with Hydra)


@entry_point
@ignore_lost_output()
def main() -> None:
    """Entry point of `hpcm train` and `python -m hpcm_scale.train`."""
    arguments = without_launcher_arguments(sys.argv[1:])
    parser = get_args_parser()
    parser.error = partial(Parser.error, parser)
    overrides = parser.parse_args(arguments).overrides
    check_overrides(overrides)
    refuse_hydra_folders(overrides)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
    composed: list[tuple[Config, list[str]]] = []
    settings: list[HydraConf] = []
    errors: list[UserError] = []

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=CONFIG_NAME)
    def job(configuration: DictConfig) -> None:
        """Collect what Hydra composes; it is trained after Hydra has returned."""
        settings.append(HydraConfig.get())
        try:
            composed.append((typed(with_size(configuration)), list(settings[-1].overrides.task)))
        except UserError as error:  # Hydra would print a line of its own
            errors.append(error)

    with tempfile.TemporaryDirectory(prefix="hpcm_hydra_") as unused:  # Hydra writes a multirun.yaml before any check
        place = arguments.index(overrides[0]) if overrides else len(arguments)  # Hydra takes overrides in one place
        sys.argv = [sys.argv[0], *arguments[:place], f"hydra.sweep.dir={quoted(unused)}", *arguments[place:]]
        try:
            translated(job)
        except ValueError as error:  # Hydra's, of options of its own that exclude each other
            if settings:
                raise
            parser.error(str(error))
    if errors:
        raise errors[0]
    if not composed:
        return  # a launcher has trained all runs, or the arguments ask for help
    if settings[0].mode == RunMode.MULTIRUN:
        from hpcm_scale.sweeps.jobs import make_job
        from hpcm_scale.sweeps.local import train_in_turn

        swept = swept_keys(arguments, sweeper_grids(settings[0].sweeper))
        code = train_in_turn([make_job(config, overrides, swept) for config, overrides in composed])
        if code:
            raise SystemExit(code)
        return
    if settings[0].runtime.choices["hydra/launcher"] != "basic":
        raise UserError("launcher-for-one-run", "hydra/launcher", "hydra/launcher is for multiruns; add -m, or omit it")
    from hpcm_scale.training.run import run  # after the arguments: torch takes seconds to import

    if not run(composed[0][0]).done:
        raise SystemExit(STOPPED)


if __name__ == "__main__":
    main()
