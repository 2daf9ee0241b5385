"""Laws, numbers and tables in words, the same in figures, reports and on the terminal."""

from __future__ import annotations

import math

from hpcm_scale.scaling.laws.law import Prediction

TITLES = {
    "power_law_of_parameters": "power law of parameters",
    "floor_of_parameters": "power law of parameters with a floor",
    "power_law_of_compute": "power law of compute, annealed frontier",
    "floor_of_compute": "power law of compute with a floor, annealed frontier",
    "power_law_of_compute_whole": "power law of compute, whole frontier",
    "floor_of_compute_whole": "power law of compute with a floor, whole frontier",
    "joint": "joint law of parameters and pixels",
    "compute_optimal": "compute-optimal law, from the joint law and the measured cost per pixel",
}
"""Names of laws, for readers."""
LOSSES = {"mse": "λ·255²·MSE + bpp", "ms_ssim": "λ·(1 − MS-SSIM) + bpp"}
"""By objective.distortion: what a loss is."""
SHORT = {
    "power_law_of_parameters": "power law",
    "floor_of_parameters": "with floor",
    "power_law_of_compute": "power law",
    "floor_of_compute": "with floor",
    "power_law_of_compute_whole": "power law",
    "floor_of_compute_whole": "with floor",
    "joint": "joint",
    "compute_optimal": "compute-optimal",
}
"""The same where the axis says what the law is of."""
DASH = "–"
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_SUPERSCRIPT = str.maketrans("-−.0123456789", "⁻⁻·⁰¹²³⁴⁵⁶⁷⁸⁹")


def count(value: float, digits: int = 3, exact: bool = False) -> str:
    """How many, as people say it: 211 k, 4.31 M, 1.00 B (10⁹); `exact`: 1 B, for round numbers."""
    for unit, name in _UNITS:
        if round_to(value, digits) >= unit:
            return f"{value / unit:g} {name}" if exact else f"{significant(value / unit, digits)} {name}"
    return f"{value:g}" if exact else significant(value, digits)


def significant(value: float, digits: int = 4) -> str:
    """A number to so many significant digits, its zeros kept, a power of ten where it is very small or large."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    power = math.floor(math.log10(abs(round_to(value, digits))))
    if -4 <= power < max(digits, 5):
        return f"{value:,.{max(digits - 1 - power, 0)}f}".replace("-", "−")
    return f"{value / 10**power:.{digits - 1}f}·10{str(power).translate(_SUPERSCRIPT)}".replace("-", "−")


def round_to(value: float, digits: int) -> float:
    """`value` to so many significant digits."""
    return float(f"{value:.{digits - 1}e}")


def with_error(value: float, error: float | None) -> str:
    """A parameter and its standard error: "0.331 ± 0.012", both to the error's second digit."""
    if error is None or not math.isfinite(error):
        return significant(value)
    if error == 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{significant(value)} ± {significant(error, 2)}"
    decimals = min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}".replace("-", "−")


def expected(prediction: Prediction, level: float) -> str:
    """A predicted loss and its interval: "1.234 (95 %: 1.201…1.268)"."""
    if not math.isfinite(prediction.low):
        return f"{loss(prediction.value)} (no interval)"
    return f"{loss(prediction.value)} ({level * 100:g} %: {loss(prediction.low)}…{loss(prediction.high)})"


def loss(value: float) -> str:
    """A loss: "1.2340", or a power of ten where an interval has lost all bounds."""
    return f"{value:.4f}" if 1e-3 <= value < 1e3 else significant(value, 2)


def percent(share: float, digits: int = 2) -> str:
    """A signed relative change: "+1.25 %", "−0.40 %"."""
    return f"{share * 100:+.{digits}f} %".replace("-", "−")
