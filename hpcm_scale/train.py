"""Command: train one configuration, or several with -m.

deepspeed --num_gpus 8 --module hpcm_scale.train model=1b engine=zero3 data.shards=shards
python -m hpcm_scale.train -m model=68m,120m,246m hydra/launcher=deepspeed hydra.launcher.gpus_per_job=4 …
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from functools import partial
from itertools import chain, count
from typing import TYPE_CHECKING, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from hpcm_scale.config.compose import (
    CONFIG_NAME,
    check_overrides,
    config_folder,
    config_loader,
    translated,
    typed,
    without_hydra,
)
from hpcm_scale.config.schema import Config
from hpcm_scale.config.sweeps import (
    DeepSpeedOptions,
    SlurmOptions,
    job_overrides,
    swept_keys,
)
from hpcm_scale.distributed.processes import without_launcher_arguments
from hpcm_scale.errors import STOPPED, Parser, UserError, entry_point, ignore_lost_output
from hpcm_scale.limits import check_numbers
from hpcm_scale.model.ladder import with_size

if TYPE_CHECKING:
    from hpcm_scale.sweeps.jobs import Job


@entry_point
@ignore_lost_output()
def main() -> None:
    """Entry point of `hpcm train` and `python -m hpcm_scale.train`."""
    sys.argv[1:] = without_launcher_arguments(sys.argv[1:])
    parser = get_args_parser()
    parser.error = partial(Parser.error, parser)
    chosen = parser.parse_args()
    check_overrides(chosen.overrides)
    asked = (chosen.help, chosen.hydra_help, chosen.cfg, chosen.resolve, chosen.shell_completion, chosen.info)
    if any(asked) or (chosen.run and chosen.multirun):
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
        answer = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=CONFIG_NAME)
        try:
            translated(answer(lambda _: None))
        except ValueError as error:  # of options that exclude each other
            parser.error(str(error))
        return
    loader, configuration = translated(partial(_composed, chosen))
    if chosen.multirun or configuration.hydra.mode == RunMode.MULTIRUN:
        code = _train_several(configuration, loader)
    elif configuration.hydra.runtime.choices["hydra/launcher"] != "basic":
        raise UserError("launcher-for-one-run", "hydra/launcher", "hydra/launcher is for multiruns; add -m, or omit it")
    else:
        config = _typed(configuration)
        from hpcm_scale.training.run import run  # after the arguments: torch takes seconds to import

        code = 0 if run(config).done else STOPPED
    if code:
        raise SystemExit(code)


def _composed(chosen: Namespace) -> tuple[ConfigLoader, DictConfig]:
    """Hydra's configuration of the command line, its own section included; values of a sweep are left out."""
    loader = config_loader(chosen.config_path, chosen.config_dir)
    configuration = loader.load_configuration(chosen.config_name or CONFIG_NAME, chosen.overrides, RunMode.MULTIRUN)
    if not chosen.multirun and configuration.hydra.mode != RunMode.MULTIRUN:
        parsed = OverridesParser.create().parse_overrides(chosen.overrides)
        loader.validate_sweep_overrides_legal(parsed, RunMode.RUN, from_shell=True)
    return loader, configuration


def _typed(configuration: DictConfig) -> Config:
    return typed(with_size(without_hydra(configuration)))


def _train_several(master: DictConfig, loader: ConfigLoader) -> int:
    """Train or submit the runs of a multirun; returns the exit code."""
    from hpcm_scale.sweeps.in_turn import train_in_turn
    from hpcm_scale.sweeps.jobs import make_job
    from hpcm_scale.sweeps.local import train_at_once
    from hpcm_scale.sweeps.slurm import submit

    settings = master.hydra
    options = OmegaConf.to_object(settings.launcher)
    train = train_in_turn
    if isinstance(options, DeepSpeedOptions | SlurmOptions):
        if "RANK" in os.environ:
            raise UserError(
                "launcher-inside-launcher",
                "hydra/launcher",
                "hydra/launcher starts the processes itself; run `python -m hpcm_scale.train -m …` without deepspeed",
            )
        check_numbers(options, "hydra.launcher.")
        train = partial(train_at_once if isinstance(options, DeepSpeedOptions) else submit, options=options)
    task = cast("list[str]", OmegaConf.to_container(settings.overrides.task))  # interpolations are those of each run
    swept, numbers = swept_keys(settings.sweeper, task), count()

    def job(overrides: list[str]) -> Job:
        configuration = loader.load_sweep_config(master, overrides)
        configuration.hydra.job.num = next(numbers)  # for ${hydra:job.num}
        return make_job(_typed(configuration), overrides, swept)

    batches = translated(partial(job_overrides, settings.sweeper, task, loader))
    for batch in [[*chain(*batches)]] if train is train_in_turn else batches:
        if code := train([translated(partial(job, overrides)) for overrides in batch]):
            return code
    return 0


if __name__ == "__main__":
    main()
