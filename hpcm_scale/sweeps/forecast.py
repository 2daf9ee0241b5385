"""Forecast of the final loss of a run that trains, from its own curve."""

from __future__ import annotations

import numpy as np

from hpcm_scale.scaling.filters import SHORTEST
from hpcm_scale.scaling.laws.fits import fit_saturating_power_law
from hpcm_scale.scaling.laws.law import CannotFit, Points

BEFORE = 0.2
"""Part of a curve that is not fitted."""
FARTHEST = 2.0
"""Multiple of the images so far up to which there is a forecast. On the runs of docs/results/ladder it was off by up to
167 % from a quarter of a run, by up to 32 % from a half, and by up to 25 % from three quarters."""
POINTS = 12
"""Points of the fit, equally spaced in log images."""


def forecast(losses: np.ndarray, images: np.ndarray, share: float) -> float | None:
    """L(share·D) of the law L = E + B·D^−β through the last 80 % of a smoothed training curve; None without a fit, or
    before the middle of the run (`FARTHEST`).

    Args:
        losses: smoothed, float64 (n,).
        images: D, number of training images at each loss, ascending, float64 (n,).
        share: images at the end of training relative to the last ones.
    """
    if losses.size < SHORTEST or losses.min() <= 0 or share > FARTHEST:
        return None
    places = np.geomspace(max(BEFORE * images[-1], images[0]), images[-1], POINTS)
    name = ("",) * POINTS
    curve = np.interp(places, images, losses)
    try:
        law = fit_saturating_power_law(Points("images", {"D": places}, curve, name, name, data="the curve"))
    except CannotFit:
        return None
    return None if law.at_bound else float(law.predict(share * images[-1]).value)
