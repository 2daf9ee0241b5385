"""What the data support, in sentences: first said, everywhere."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hpcm_scale.scaling.analysis import PARAMETER_LAWS, Analysis
from hpcm_scale.scaling.laws.fits import ENOUGH
from hpcm_scale.scaling.laws.law import Law
from hpcm_scale.scaling.wording import DASH, TITLES, count, expected, loss, percent, significant

FACTORS = (2, 10)
"""Multiples of the largest size (or compute) that laws are asked about."""


def parameter_law(analysis: Analysis) -> Law | None:
    """The preferred law of parameters."""
    return _preferred(analysis, "parameters")


def compute_law(analysis: Analysis) -> Law | None:
    """The preferred law of compute: of the annealed frontier or else the whole one, no exponent at its edge."""
    laws = (_preferred(analysis, key) for key in ("compute", "compute_whole"))
    return next((law for law in laws if law is not None and not law.at_edge), None)


def no_best_split(analysis: Analysis) -> str:
    """Why there is no compute-optimal law."""
    return analysis.refused.get("joint") or analysis.refused.get("compute_optimal") or "there is no joint law"


def _preferred(analysis: Analysis, key: str) -> Law | None:
    return analysis.laws[analysis.preferred[key]] if key in analysis.preferred else None


def headline(analysis: Analysis) -> str:
    """What ten times the largest size promises, or that nothing can be said."""
    law = parameter_law(analysis)
    if law is None:
        reasons = [analysis.refused[name] for name in PARAMETER_LAWS if name in analysis.refused]
        return f"These runs carry no law of parameters: {reasons[0] if reasons else 'there is none to fit'}."
    largest = law.observed["N"][1]
    ahead = law.predict(10 * largest, analysis.level)
    text = (
        f"By the {TITLES[law.name]} ({law.data}), 10 times the largest size ({count(10 * largest)} parameters) comes "
        f"to a loss of {expected(ahead, analysis.level)}."
    )
    return f"{text} At fixed λ: {analysis.rate_gain.sentence}." if analysis.rate_gain else text


def doubts(analysis: Analysis) -> list[str]:
    """Why not to believe the headline; sentences, the gravest first, empty where the data support it."""
    law = parameter_law(analysis)
    if law is None:
        return []
    told = []
    sizes = len({residual.x for residual in analysis.trust[law.name].residuals})
    slope = law.parameters["alpha"]
    error = (law.standard_errors or {}).get("alpha")
    if slope <= 0 or law.parameters["A"] == 0:
        told.append("the loss does not fall with parameters here")
    elif error is not None and slope < 2 * error:
        told.append(f"the exponent, {slope:.3f}, is less than two standard errors ({error:.3f}) from zero")
    if law.at_edge:
        told.append("an exponent ended at the edge of its range, so the law foretells nothing")
    if not law.converged:
        told.append("the fit did not converge")
    if law.covariance is None:
        told.append("there are no more trainings than parameters of the law, so nothing tells how sure it is")
    told += _contested(analysis)
    told += _more_data(analysis, law)
    told += _held_out(analysis, law)
    if sizes < ENOUGH:
        told.append(f"{sizes} sizes are few: with fewer than {ENOUGH} a floor can hardly be told from none")
    if not any(point.annealed for point in analysis.observations):
        told.append("no run was annealed: the losses still hold what a decay of the learning rate would take off")
    smallest, reached = law.observed["N"]
    if reached < 10 * smallest:
        told.append(f"the sizes span a factor of {reached / smallest:.1f}, and ten times is a longer way than that")
    return told


def _contested(analysis: Analysis) -> list[str]:
    comparison = analysis.comparisons.get("parameters")
    if comparison is None or not comparison.contested:
        return []
    line = analysis.laws["power_law_of_parameters"]
    ahead = expected(line.predict(10 * line.observed["N"][1], analysis.level), analysis.level)
    gain = analysis.rate_gains.get(line.name)
    rate = f"; {gain.sentence}" if gain else ""
    return [f"{comparison.reason}; without a floor, ten times the largest size comes to {ahead}{rate}"]


def _more_data(analysis: Analysis, law: Law) -> list[str]:
    """That a training on more data than the law's is already below what the law promises."""
    ahead = law.predict(10 * law.observed["N"][1], analysis.level).value
    best = min(analysis.observations, key=lambda each: each.loss)
    if best.run in law.runs or best.loss >= ahead:
        return []
    return [
        f"on {count(best.pixels)} pixels {best.model} has come to {loss(best.loss)}, below this law at ten times the "
        "largest size: more data buys more than size on so little, and what looks like a floor may be that of the data"
    ]


def _held_out(analysis: Analysis, law: Law) -> list[str]:
    trust = analysis.trust.get(law.name)
    missed = [held for held in trust.largest if held.inside is False] if trust else []
    if not missed:
        return []
    worst = max(missed, key=lambda held: abs(held.error))
    return [
        f"fitted without the largest size, the law misses it by {percent(worst.error)}, outside its own interval"
        + _better(analysis, law, abs(worst.error))
    ]


def _better(analysis: Analysis, law: Law, miss: float) -> str:
    """That another law of parameters foretold the largest size better."""
    for name in PARAMETER_LAWS:
        held = analysis.trust[name].largest if name in analysis.trust else ()
        worst = max((abs(each.error) for each in held), default=math.inf)
        if name != law.name and worst < miss:
            return f", and the {TITLES[name]} by {worst * 100:.2f} % only"
    return ""


def improvement(law: Law, factor: float, variable: str, level: float) -> tuple[float, float, float]:
    """Relative change of the loss, and its interval, from the largest observed x to `factor` times as much."""
    largest = law.observed[variable][1]
    start = float(law.predict(largest, level).value)
    change = law.change(largest, factor * largest, level)
    return tuple(float(value) / start if math.isfinite(value) else math.nan for value in change)


# What a fit found, on the terminal.


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
