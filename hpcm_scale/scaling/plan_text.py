"""A plan on the terminal."""

from __future__ import annotations

from hpcm_scale.scaling.plan import Plan, Training
from hpcm_scale.scaling.words import SHORT, count, loss, significant


def print_plan(plan: Plan) -> None:
    """Print sizes, losses, what to beware of, and the command."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    setting = plan.setting
    console.print(
        f"{significant(plan.pflops)} PFLOPs: {_duration(plan.days)} on {setting.gpus} × {setting.gpu} at "
        f"{setting.mfu:.0%} of their {setting.precision} peak"
    )
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("size", no_wrap=True)
    for heading in ("parameters", "pixels", "images", "steps", *(["epochs"] if setting.images_in_set else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"loss ({plan.level * 100:g} %)", justify="right", no_wrap=True)
    for training in (plan.optimum, *plan.presets):
        name = training.model or "optimum"
        row = [f"{name} ←" if name == plan.chosen else name, count(training.parameters), count(training.pixels)]
        row += [count(training.images), f"{training.steps:,}"]
        row += [significant(training.epochs, 3)] if setting.images_in_set else []
        table.add_row(*row, _loss(training))
    console.print(table)
    laws = ", ".join(SHORT[name] for name in plan.laws)
    console.print(f"By the laws: {laws}. Steps of {setting.batch} crops of {setting.crop}².", soft_wrap=True)
    for sentence in plan.outside:
        console.print(f"Outside what was observed: {sentence}.", soft_wrap=True)
    for sentence in plan.notes:
        console.print(f"Note: {sentence[0].upper()}{sentence[1:]}.", soft_wrap=True)
    print(f"\n{plan.command}")


def _loss(training: Training) -> str:
    if training.loss is None:
        return "unknown"
    if training.low is None or training.high is None:
        return loss(training.loss)
    return f"{loss(training.loss)} ({loss(training.low)}…{loss(training.high)})"


def _duration(days: float) -> str:
    if days >= 2:
        return f"{days:,.1f} days"
    if days >= 2 / 24:
        return f"{days * 24:,.1f} hours"
    if days >= 2 / (24 * 60):
        return f"{significant(days * 24 * 60, 2)} minutes"
    return f"{significant(days * 24 * 3600, 2)} seconds"
