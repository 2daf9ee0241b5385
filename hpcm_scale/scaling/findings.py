"""Findings of an analysis in sentences, the same in report, terminal summary, plan and wandb."""

from __future__ import annotations

import math

from hpcm_scale.formatting import count, percent, significant
from hpcm_scale.scaling.analysis import PARAMETER_LAWS, PARAMETERS_AND_DATA, Analysis
from hpcm_scale.scaling.laws.fits import ENOUGH
from hpcm_scale.scaling.laws.law import Law, Prediction

SOURCES = {
    "parameters": "parameters",
    "compute": "compute, annealed frontier",
    "compute_whole": "compute, whole frontier",
}
"""What the power laws are fitted to."""
TITLES = {
    f"{kind}_of_{of}": f"{kind.replace('_', ' ')} of {source}"
    for of, source in SOURCES.items()
    for kind in ("power_law", "saturating_power_law")
} | {PARAMETERS_AND_DATA: "L(N, D)", "compute_optimal": "compute-optimal law"}
"""Names of laws."""
SHORT = {name: title.split(" of ")[0] for name, title in TITLES.items()}
"""Names of laws where an axis or a caption gives the variable."""


def loss(value: float) -> str:
    """A loss: "1.2340", or a power of ten for an interval without useful bounds."""
    return f"{value:.4f}" if 1e-3 <= value < 1e3 else significant(value, 2)


def expected(prediction: Prediction, level: float) -> str:
    """A predicted loss with its interval: "1.234 (95 %: 1.201…1.268)"."""
    if not math.isfinite(prediction.low):
        return f"{loss(prediction.value)} (no interval)"
    return f"{loss(prediction.value)} ({level * 100:g} %: {loss(prediction.low)}…{loss(prediction.high)})"


def parameter_law(analysis: Analysis) -> Law | None:
    """The preferred law of parameters."""
    return analysis.laws.get(analysis.preferred.get("parameters", ""))


def compute_law(analysis: Analysis) -> Law | None:
    """The preferred law of compute, of the annealed frontier if possible, whose exponent is not at a bound."""
    laws = (analysis.laws.get(analysis.preferred.get(of, "")) for of in ("compute", "compute_whole"))
    return next((law for law in laws if law is not None and not law.at_bound), None)


def no_optimum(analysis: Analysis) -> str:
    """Why there is no compute-optimal law."""
    return analysis.refused.get(PARAMETERS_AND_DATA) or analysis.refused.get("compute_optimal") or "there is no L(N, D)"


def summary(analysis: Analysis) -> list[str]:
    """The headline and its caveats, as sentences."""
    return [headline(analysis), *(f"Caveat: {caveat}." for caveat in caveats(analysis))]


def headline(analysis: Analysis) -> str:
    """The predicted loss and rate at ten times the largest size."""
    law = parameter_law(analysis)
    if law is None:
        reasons = [analysis.refused[name] for name in PARAMETER_LAWS if name in analysis.refused]
        return f"These runs determine no law of parameters: {reasons[0] if reasons else 'there is none to fit'}."
    text = (
        f"By the {TITLES[law.name]} ({law.data}), ten times the largest size "
        f"({count(10 * law.observed['N'][1])} parameters) has a predicted loss of {_ten_times(law, analysis.level)}."
    )
    return f"{text} At fixed λ, {analysis.rate_gain.sentence}." if analysis.rate_gain else text


def _ten_times(law: Law, level: float) -> str:
    return expected(law.predict(10 * law.observed["N"][1], level), level)


def caveats(analysis: Analysis) -> list[str]:
    """Reasons to doubt the headline, as sentences, the most serious first; empty if there is none."""
    law = parameter_law(analysis)
    if law is None:
        return []
    found = []
    exponent = law.parameters["alpha"]
    error = (law.standard_errors or {}).get("alpha")
    if exponent <= 0 or law.parameters["A"] == 0:
        found.append("the loss does not fall with parameters")
    elif error is not None and exponent < 2 * error:
        found.append(f"the exponent, {exponent:.3f}, is less than two standard errors ({error:.3f}) from zero")
    if law.at_bound:
        found.append("an exponent is at a bound of its range, so the law does not extrapolate")
    if not law.converged:
        found.append("the fit did not converge")
    if law.covariance is None:
        found.append("the law has no interval: its trainings do not determine the errors of its parameters")
    found += [*_criteria(analysis), *_more_data(analysis, law), *_held_out(analysis, law)]
    sizes = len({residual.x for residual in analysis.diagnostics[law.name].residuals})
    if sizes < ENOUGH:
        found.append(
            f"there are only {sizes} sizes: with fewer than {ENOUGH}, an irreducible loss can hardly be distinguished "
            "from zero"
        )
    if not any(point.annealed for point in analysis.observations):
        found.append("no run was annealed: the losses include what a decay of the learning rate would remove")
    smallest, largest = law.observed["N"]
    if largest < 10 * smallest:
        found.append(f"the sizes span a factor of {largest / smallest:.1f}, less than the extrapolation to ten times")
    return found


def _criteria(analysis: Analysis) -> list[str]:
    comparison = analysis.comparisons.get("parameters")
    if comparison is None or not comparison.criteria_disagree:
        return []
    line = analysis.laws["power_law_of_parameters"]
    gain = analysis.rate_gains.get(line.name)
    rate = f"; {gain.sentence}" if gain else ""
    ahead = _ten_times(line, analysis.level)
    return [f"{comparison.reason}; without irreducible loss, the predicted loss at ten times is {ahead}{rate}"]


def _more_data(analysis: Analysis, law: Law) -> list[str]:
    """Whether a training with more data than the law's is already below the law's prediction."""
    ahead = law.predict(10 * law.observed["N"][1], analysis.level).value
    best = min(analysis.observations, key=lambda each: each.loss)
    if best.run in law.runs or best.loss >= ahead:
        return []
    return [
        f"with {count(best.pixels)} pixels, {best.model} reached {loss(best.loss)}, below this law at ten times the "
        "largest size: here data matters more than size, and the irreducible loss may be that of too little data"
    ]


def _held_out(analysis: Analysis, law: Law) -> list[str]:
    missed = [held for held in analysis.diagnostics[law.name].largest if held.inside is False]
    if not missed:
        return []
    worst = max(missed, key=lambda held: abs(held.error))
    text = f"fitted without the largest size, the law misses it by {percent(worst.error)}, outside its interval"
    for name in PARAMETER_LAWS:
        held = analysis.diagnostics[name].largest if name in analysis.diagnostics else ()
        other = max((abs(each.error) for each in held), default=math.inf)
        if name != law.name and other < abs(worst.error):
            text += f"; the {TITLES[name]} misses it by {other * 100:.2f} %"
    return [text]


def improvement(law: Law, factor: float, variable: str, level: float) -> tuple[float, float, float]:
    """Relative change of the loss, with its interval, from the largest observed x to `factor` times as much."""
    largest = law.observed[variable][1]
    start = float(law.predict(largest, level).value)
    change = law.change(largest, factor * largest, level)
    value, low, high = (float(each) / start if math.isfinite(each) else math.nan for each in change)
    return value, low, high
