"""Names for the runs of a multirun."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser

from hpcm_scale.config.schema import Config


def name_run(config: Config, job: Sequence[str], arguments: Sequence[str]) -> None:
    """Give a job of a multirun its sweep and its folder, unless the user named them.

    `job` are the overrides of this job, `arguments` those of the whole multirun. The sweep is named after
    the keys it varies, the run after their values: runs/sweep_model/model=nano.
    """
    swept = swept_keys(arguments)
    if not swept:
        return  # one job alone is a run like any other
    config.run.sweep = config.run.sweep or "sweep_" + "_".join(key.replace("/", ".") for key in swept)
    chosen = [override for override in job if override.split("=")[0].lstrip("+") in swept]
    if config.run.dir is None:
        name = ",".join(chosen).replace("/", "_")
        config.run.dir = f"runs/{config.run.sweep}/{name}"


def swept_keys(arguments: Sequence[str]) -> list[str]:
    """The keys that a multirun's command line gives several values."""
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(overrides)
    return [override.key_or_group for override in parsed if override.is_sweep_override()]
