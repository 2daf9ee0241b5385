"""What a fit found, on the terminal."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hpcm_scale.scaling.analysis import Analysis
from hpcm_scale.scaling.laws.law import Law
from hpcm_scale.scaling.verdict import doubts, headline
from hpcm_scale.scaling.words import DASH, count, loss, percent, significant


def print_summary(analysis: Analysis) -> None:
    """Print observations, laws, the headline with its doubts, and what was left out."""
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(_observations(analysis))
    if analysis.laws:
        console.print(_laws(analysis))
        console.print(_LEGEND, soft_wrap=True)
    console.print(headline(analysis), soft_wrap=True)
    for doubt in doubts(analysis):
        console.print(f"Doubt: {doubt}.", soft_wrap=True)
    reasons: dict[str, list[str]] = {}
    for name, why in sorted(analysis.refused.items()):
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        console.print(f"Not fitted, {', '.join(names)}: {why}.", soft_wrap=True)
    for sentence in analysis.left_out:
        console.print(f"Left out: {sentence}.", soft_wrap=True)


def _observations(analysis: Analysis) -> Table:
    title = f"{analysis.metric}, λ = {analysis.lmbda:g}"
    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, title=title, title_justify="left"
    )
    table.add_column("run", overflow="fold")
    for heading in ("parameters", "pixels", "PFLOPs", "loss", "annealed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for point in analysis.observations:
        state = ("yes" if point.annealed else "no") + ("" if point.finished else " *")
        numbers = (count(point.parameters), count(point.pixels), significant(point.pflops), f"{point.loss:.4f}", state)
        table.add_row(point.run, *numbers)
    if not all(point.finished for point in analysis.observations):
        table.caption = "* unfinished"
    return table


def _laws(analysis: Analysis) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("law", overflow="fold")
    for heading in ("of", "AICc", "held out", f"10 × ({analysis.level * 100:g} %)"):
        table.add_column(heading, justify="right" if heading != "of" else "left", no_wrap=True)
    for law in analysis.laws.values():
        if law.name == "compute_optimal":
            continue
        mark = " ←" if law.name in analysis.preferred.values() else ""
        trust = analysis.trust.get(law.name)
        held = max((each.error for each in trust.largest), key=abs) if trust and trust.largest else None
        aicc = DASH if law.aicc is None else f"{law.aicc:.1f}"
        cells = (law.formula + mark, _OF[law.name.split("_of_")[-1]], aicc, DASH if held is None else percent(held))
        table.add_row(*cells, _ahead(law, analysis.level))
    return table


_LEGEND = (
    "← preferred. Of: one training of each size, at equal data if they share any; the annealed or the whole "
    "frontier; all trainings. Held out: error at the largest size or compute, fitted without it. 10 ×: loss at ten "
    "times the largest."
)
_OF = {"parameters": "sizes", "compute": "annealed", "compute_whole": "whole", "joint": "trainings"}


def _ahead(law: Law, level: float) -> str:
    if len(law.variables) > 1:
        return DASH
    value, low, high = law.predict(10 * law.observed[law.variables[0]][1], level)
    return loss(value) + (f" ({loss(low)}…{loss(high)})" if math.isfinite(low) else "")
