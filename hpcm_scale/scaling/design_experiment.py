"""The experiment that trains a design, the commands that run it, and what is printed of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from hpcm_scale.compute.tracker import PETA
from hpcm_scale.config.compose import config_folder
from hpcm_scale.errors import UserError
from hpcm_scale.files import write_text, writing
from hpcm_scale.formatting import count, counted, duration, percent, significant, terminal, terminal_table, with_error
from hpcm_scale.scaling.design import AHEAD, PARTS, Design
from hpcm_scale.scaling.plan import Setting


def write_experiment(made: Design, path: Path) -> None:
    """Write the constant-rate runs as an experiment, with description and commands as comments.

    The runs are grids of one multirun (conf/hydra/sweeper/grids.yaml). Cooldowns start from their checkpoints, which an
    experiment cannot express: they are commands of their own (`commands`).

    Raises:
        UserError: `path` exists, or is not among the experiments, where the launchers find it.
    """
    folder = config_folder() / "experiment"
    if path.suffix != ".yaml" or path.absolute().parent.resolve() != folder.resolve():
        raise UserError(
            "design-not-among-experiments",
            "--out",
            f"the launchers do not find {path}; use --out {folder / 'NAME.yaml'}",
        )
    if path.exists():
        raise UserError("design-exists", "--out", f"{path} exists; choose another name, or remove it")
    groups = {each.name for each in config_folder().iterdir() if each.is_dir()}
    defaults: list[Any] = [{"override /hydra/sweeper": "grids"}]
    settings: dict[str, Any] = {}
    for override in OverridesParser.create().parse_overrides(list(made.overrides)):
        if override.key_or_group in groups:
            defaults.append({f"override /{override.key_or_group}": override.value()})
        else:
            *sections, key = override.key_or_group.split(".")
            inner = settings
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[key] = override.value()
    settings["hydra"] = {"mode": "MULTIRUN", "sweeper": {"grids": [*map(dict, _grids(made))]}}
    settings["run"] = {"sweep": path.stem, "dir": f"runs/${{run.sweep}}/{_run(made, '${model.name}', '${train.seed}')}"}
    comments = [*describe(made), "Commands:", *commands(made, path.stem)]
    lines = ["# @package _global_", *(f"# {line}" for line in comments)]
    yaml = OmegaConf.to_yaml(OmegaConf.create({"defaults": [*defaults, "_self_"], **settings}))
    with writing(path):
        write_text(path, "\n".join([*lines, yaml]))


def _grids(made: Design) -> list[dict[str, str]]:
    seeds = ",".join(map(str, range(made.seeds)))
    return [
        {
            **size.overrides,
            "train.steps": str(cooldowns[-1]),
            "train.keep_at": str(cooldowns),
            "train.seed": seeds,
        }
        for size, cooldowns in zip(made.sizes, made.cooldowns.tolist(), strict=True)
    ]


def _run(made: Design, model: str, seed: object) -> str:
    """Name of a run folder."""
    return f"{model},seed={seed}" if made.seeds > 1 else model


def commands(made: Design, name: str) -> list[str]:
    """The commands that train the experiment `name` and fit its laws; one `hpcm cooldown` for sizes of equal steps."""
    runs: dict[tuple[int, ...], list[str]] = {}
    for size, cooldowns in zip(made.sizes, made.cooldowns.tolist(), strict=True):
        names = [f"runs/{name}/{_run(made, size.name, seed)}" for seed in range(made.seeds)]
        runs.setdefault(tuple(cooldowns), []).extend(names)
    return [
        f"hpcm train experiment={name} data.shards=shards eval.images=kodak",
        *(
            f"hpcm cooldown {' '.join(folders)} --at {' '.join(map(str, steps))} --decay {1 / PARTS:g}"
            for steps, folders in runs.items()
        ),
        f"hpcm scaling fit runs/{name} --out results",
    ]


def describe(made: Design) -> list[str]:
    """Trainings, recipe and predicted errors, one sentence each."""
    law, settings, errors = made.law.parameters, made.settings, made.law.standard_errors
    assert errors is not None
    (sizes, amounts), largest = made.steps.shape, made.largest
    near, far = (made.optimal.optimum(factor * largest).parameters for factor in (1, AHEAD))
    sentences = [
        f"{counted(sizes * amounts * made.seeds, 'training')}: {sizes} sizes × {amounts} amounts of data "
        f"({made.spread}) × {counted(made.seeds, 'seed')}, {significant(made.pflops.sum())} PFLOPs.",
        f"Batches of {settings.batch_size} crops of {settings.crop}², learning rate {settings.learning_rate:g} "
        f"({settings.parametrisation}) for all sizes, λ = {settings.lmbda:g}.",
        f"Assumed: L = {law['E']:.3g} + {law['A']:.3g}·N^−{law['alpha']:.3g} + {law['B']:.3g}·D^−{law['beta']:.3g}, "
        f"and a standard deviation of {percent(made.law.residual_deviation or 0)[1:]} between seeds.",
        f"Predicted standard errors: α = {with_error(law['alpha'], errors['alpha'])}, β = "
        f"{with_error(law['beta'], errors['beta'])}; log N* ± {significant(made.error_of_size(largest), 2)} at "
        f"{significant(largest, 3)} PFLOPs, the largest training (N* = {count(near)}), and "
        f"± {significant(made.error_of_size(AHEAD * largest), 2)} at {AHEAD:g} times that (N* = {count(far)}).",
    ]
    if near > made.sizes[-1].parameters:
        sentences.append("Caveat: N* of the largest training is above all sizes; add larger ones.")
    if weak := [name for name in ("alpha", "beta") if errors[name] > law[name] / 2]:
        sentences.append(f"Caveat: these trainings hardly determine {' and '.join(weak)}; raise --pflops.")
    return sentences


def print_design(made: Design, setting: Setting, name: str) -> None:
    """Print trainings, predicted errors, duration and commands."""
    console = terminal()
    pixels = made.settings.pixels_per_step
    rows = [
        [
            size.name,
            count(size.parameters),
            significant(price, 3),
            f"{steps[-1]:,}",
            *(count(each * pixels) for each in (steps[0], steps[-1])),
        ]
        for size, price, steps in zip(made.sizes, made.pflops, made.steps, strict=True)
    ]
    headings = ["model", "parameters", "PFLOPs", "most steps", "least pixels", "most pixels"]
    console.print(terminal_table(headings, rows))
    seconds = made.pflops.sum() * PETA / (setting.peak() * setting.mfu)
    took = f"{duration(seconds)} on {setting.gpus} × {setting.gpu} at {setting.mfu:.0%} of their peak"
    for sentence in ("", *describe(made), f"Duration: {took}.", "", *commands(made, name)):
        console.print(sentence, soft_wrap=True)
