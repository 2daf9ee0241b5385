"""The generalized Gaussian in float64, written another way than the package: with scipy's gamma functions."""

from __future__ import annotations

import numpy as np
from scipy.special import gamma, gammainc, gammaincc

ORDER = 2 / 3
DENSITY_AT_MODE = 1.5 / (2 * gamma(ORDER))


def probability(residual: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Probability of the unit bin, from whichever incomplete gamma function keeps its digits."""
    near = (np.abs(residual) - 0.5) / scale
    x, y = np.abs(near) ** 1.5, ((np.abs(residual) + 0.5) / scale) ** 1.5
    lower, upper = gammainc(ORDER, x), gammaincc(ORDER, x)
    beside = np.where(x < 0.5, gammainc(ORDER, y) - lower, upper - gammaincc(ORDER, y))
    return 0.5 * np.where(near < 0, lower + gammainc(ORDER, y), beside)


def slopes(residual: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Derivatives of `probability` by residual and by scale, and how large the latter's own terms are."""
    magnitude = np.abs(residual)
    near, far = (magnitude - 0.5) / scale, (magnitude + 0.5) / scale
    x, y = np.abs(near) ** 1.5, far**1.5
    # far − |near| is the smaller of 1 and 2|v|, over s: y − x without the cancellation.
    width = np.minimum(1, 2 * magnitude) / scale
    growth = width * (far**2 + far * np.abs(near) + near**2) / (x + y)
    density_near, density_far = DENSITY_AT_MODE * np.exp(-x), DENSITY_AT_MODE * np.exp(-y)
    by_residual = np.sign(residual) * density_near * np.expm1(-growth) / scale
    by_scale = -(far * density_far - near * density_near) / scale
    # The slope by scale is a difference, of the edges' terms or, in a narrow bin, of width and decline.
    edges = far * density_far + np.abs(near) * density_near
    balance = np.minimum(edges, density_near * (1 / scale - far * np.expm1(-growth))) / scale
    return by_residual, by_scale, balance
