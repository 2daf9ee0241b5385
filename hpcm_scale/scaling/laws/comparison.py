"""Which of two laws of the same trainings the data prefer: the power law alone, or with a floor."""

from __future__ import annotations

from dataclasses import dataclass

from scipy import stats

from hpcm_scale.scaling.laws.law import Law

REJECTED = 0.05
"""Probability under which an F test rejects the power law."""


@dataclass(frozen=True)
class Comparison:
    """A power law and the same with a floor, through the same points."""

    preferred: str
    """Name of the law with the lower AICc; but where few points leave the floor none, or too little (`contested`), of
    the law that `f_probability` favours."""
    reason: str
    """A sentence."""
    aicc_difference: float | None
    """AICc of the law with a floor less that of the power law; None where either has none."""
    f_probability: float | None
    """Probability of so much better a fit by the floor if there were none; None without degrees of freedom."""
    contested: bool
    """AICc prefers the power law, but the F test rejects it, and decides: on six trainings AICc charges 30 for a floor,
    and overlooked nine in ten floors, simulated, that the F test saw in all."""


def compare(power_law: Law, floor: Law | None) -> Comparison:
    """Compare by AICc, with an F test beside it, since AICc says nothing, or little, of a floor on few trainings.

    The F test (extra sum of squares) weighs Σr² of log L of both laws at 1 and n − 3 degrees of freedom. It is exact
    for linear laws only; simulated on 4 to 10 sizes, it rejected power laws that were true 2–5 % of the time.
    """
    if floor is None:
        return Comparison(power_law.name, "only the power law could be fitted", None, None, False)
    probability = _f_probability(power_law, floor)
    rejected = probability is not None and probability < REJECTED
    by_f = f"an F test {'rejects' if rejected else 'does not reject'} the power law without a floor"
    by_f = "" if probability is None else f"{by_f} (p = {probability:.2g})"
    if power_law.aicc is None or floor.aicc is None:
        best = floor if rejected else power_law
        reason = f"AICc needs six trainings to weigh a floor and there are {power_law.points}"
        by_f = by_f or "nothing else can tell, and the power law stands for want of better"
        return Comparison(best.name, f"{reason}; {by_f}", None, probability, False)
    difference = floor.aicc - power_law.aicc
    best = floor if difference < 0 or rejected else power_law
    contested = difference >= 0 and rejected
    kind = "with" if difference < 0 else "without"
    reason = f"AICc is lower by {abs(difference):.1f} for the power law {kind} a floor"
    reason += f", but on {power_law.points} trainings it can overlook one, and {by_f}" if contested else f", and {by_f}"
    return Comparison(best.name, reason, difference, probability, contested)


def _f_probability(power_law: Law, floor: Law) -> float | None:
    if not floor.degrees_of_freedom or floor.residual_deviation is None or power_law.residual_deviation is None:
        return None
    alone, beside = (law.residual_deviation**2 * law.degrees_of_freedom for law in (power_law, floor))
    if beside <= 0:
        return 0.0 if alone > 0 else 1.0
    ratio = max(alone - beside, 0.0) / (beside / floor.degrees_of_freedom)
    return float(stats.f.sf(ratio, 1, floor.degrees_of_freedom))
