"""How sure a fit is: AICc, and the covariance of its parameters."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import erf

from hpcm_scale.scaling.laws.sum_of_powers import SumOfPowers

DETERMINED = 1e-7
"""Ratio of smallest to largest singular value of the scaled Jacobian under which a parameter is not determined."""


def aicc(residuals: np.ndarray, parameters: int) -> float | None:
    """Akaike's information criterion for few points, of normal residuals with unknown variance.

    n·log(Σr²/n) + 2K + 2K(K + 1)/(n − K − 1) with K = `parameters` + 1, the variance being estimated, too
    (Hurvich and Tsai 1989; Burnham and Anderson 2002, section 7.4). None unless n > K + 1. Comparable between
    laws of the same points only. Residuals of log L below rounding count as rounding.
    """
    n, count = residuals.size, parameters + 1
    if n <= count + 1:
        return None
    mean_square = max(float(np.mean(residuals**2)), float(np.finfo(np.float64).eps) ** 2)
    return n * math.log(mean_square) + 2 * count + 2 * count * (count + 1) / (n - count - 1)


def huber_inflation(delta: float | None, deviation: float) -> float:
    """Variance of a Huber estimate over that of least squares, for normal residuals of this deviation.

    E[ψ²]/E[ψ′]² (Huber 1964): 1 for a threshold far above the residuals, π/2 for one far below.
    """
    if delta is None:
        return 1.0
    threshold = delta / max(deviation, 1e-12)
    if threshold < 1e-4:
        return math.pi / 2
    inside = float(erf(threshold / math.sqrt(2)))
    density = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi)
    clipped = inside - 2 * threshold * density + threshold**2 * (1 - inside)
    return clipped / inside**2


def covariance(fit: SumOfPowers, deviation: float, delta: float | None = None) -> np.ndarray | None:
    """Covariance of (E, A, α, …) of L = E + Σ A·x^−α, x as it is: (p, p) float64.

    σ²(JᵀJ)⁻¹ in centred coordinates, taken to x itself. A parameter at its bound of zero counts as free, which widens
    the intervals. None where the points do not determine every parameter.
    """
    norms = np.linalg.norm(fit.jacobian, axis=0)
    if np.any(norms == 0):
        return None
    _, singular, rows = np.linalg.svd(fit.jacobian / norms, full_matrices=False)
    if singular[-1] < DETERMINED * singular[0]:
        return None
    root = (rows.T / singular) / norms[:, None]
    scale = np.eye(norms.size)
    for index, (coefficient, exponent, centre) in enumerate(
        zip(fit.coefficients, fit.exponents, fit.centres, strict=True)
    ):
        at = 1 + 2 * index
        scale[at, at] = centre**exponent
        scale[at, at + 1] = coefficient * centre**exponent * math.log(centre)
    root = scale @ root
    return deviation**2 * huber_inflation(delta, deviation) * (root @ root.T)
