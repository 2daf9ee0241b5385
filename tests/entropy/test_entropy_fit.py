"""Where the polynomial of the likelihood comes from; run this file to print its coefficients."""

from __future__ import annotations

import numpy as np
from entropy_reference import DENSITY_AT_MODE, ORDER
from scipy.optimize import linprog
from scipy.special import gammaincc

from hpcm_scale.entropy.generalized_gaussian import COMPACTION, HAZARD_COEFFICIENTS

FARTHEST_ROOT = 4.2  # √t, where the survival function is 1e-33


def relative_errors(nodes: int, degree: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """A matrix and a vector: A·c − r are the errors to keep small for coefficients c of y², …, y^degree.

    First the relative error of the survival function Q, then that of the density −Q', which is what a
    narrow bin sees; any bin's error lies between.
    """
    u = (1 - np.cos((np.arange(nodes) + 0.5) / nodes * np.pi)) / 2 * FARTHEST_ROOT
    mills = np.exp(u**3) * gammaincc(ORDER, u**3) / 2 / DENSITY_AT_MODE  # Q/f, f the density
    h = -np.log(2 * DENSITY_AT_MODE * mills)
    h_slope = 1 / mills - 1.5 * u  # dH/dt = f/Q; d(t^1.5)/dt = 1.5u
    powers = np.arange(2, degree + 1)
    y = COMPACTION * u / (1 + COMPACTION * u)
    y_slope = COMPACTION / (1 + COMPACTION * u) ** 2 / (2 * u)
    basis = y[:, None] ** powers
    basis_slope = powers * y[:, None] ** (powers - 1) * y_slope[:, None]
    matrix = np.vstack([basis, basis - basis_slope * mills[:, None]])
    return matrix, np.concatenate([h, h - h_slope * mills])


def minimax(nodes: int) -> tuple[np.ndarray, float]:
    """Coefficients with the least largest error, by linear programming, and that error."""
    matrix, target = relative_errors(nodes)
    units = np.abs(matrix).max(axis=0)
    largest = np.full((len(target), 1), -1.0)
    magnified = 1e5 * matrix / units  # errors of 1e-6 must stand clear of the solver's tolerance
    solution = linprog(
        np.append(np.zeros(len(units)), 1.0),
        A_ub=np.block([[magnified, largest], [-magnified, largest]]),
        b_ub=1e5 * np.concatenate([target, -target]),
        bounds=(None, None),
        method="highs",
    )
    coefficients = solution.x[:-1] / units
    return coefficients, np.abs(matrix @ coefficients - target).max()


def test_coefficients_are_the_minimax_ones():
    matrix, target = relative_errors(nodes=3000)
    error = np.abs(matrix @ np.array(HAZARD_COEFFICIENTS) - target).max()
    _, least = minimax(nodes=400)
    assert error <= 1.02 * least
    assert error < 3.1e-6


def test_fp32_coefficients_lose_little():
    matrix, target = relative_errors(nodes=3000)
    rounded = np.array(HAZARD_COEFFICIENTS, dtype=np.float32).astype(np.float64)
    assert np.abs(matrix @ rounded - target).max() < 4e-6


if __name__ == "__main__":
    found, error = minimax(nodes=400)
    print(*(f"    {coefficient:.9g}," for coefficient in found), f"largest error {error:.3g}", sep="\n")
