"""Names for the runs of a multirun."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser

from hpcm_scale.config.schema import Config


def name_run(config: Config, job: Sequence[str], swept: Sequence[str]) -> None:
    """Give a job of a multirun its sweep and its folder, unless the user named them.

    `job` are the overrides of this job, `swept` the keys that set the jobs apart (`swept_keys`). The sweep is
    named after these keys, the run after their values: runs/sweep_model/model=nano.
    """
    if not swept:
        return  # one job alone is a run like any other
    config.run.sweep = config.run.sweep or "sweep_" + "_".join(key.replace("/", ".") for key in swept)
    chosen = [override for override in job if override.split("=")[0].lstrip("+") in swept]
    if config.run.dir is None:
        name = ",".join(chosen).replace("/", "_")
        config.run.dir = f"runs/{config.run.sweep}/{name}"


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
