"""Noisy losses smoothed over compute, without blurring what a falling learning rate does to them."""

from __future__ import annotations

import numpy as np

DECADES = 0.05
"""Standard deviation of the window in log10(compute): about a tenth of the compute so far."""
RATE = 0.1
"""Change of the learning rate, as a part of its peak, that counts as much as DECADES of compute. The loss falls
within a few percent of a run as the rate decays, or at once where it drops: a window over both sides would lower the
curve before, and raise it after."""
ONE_OPERATION = 1e-15
"""In PFLOPs: the least that compute counts as."""
_PER_WINDOW = 4
"""Bins in a standard deviation of the window."""


def smooth(
    compute: np.ndarray, values: np.ndarray, learning_rate: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Local linear fit of `values` over log10(compute) under a Gaussian window, for drawing.

    Takes one-dimensional float64 arrays, ascending in compute, with the learning rate of each point if known;
    returns compute, ascending, at up to a few hundred places, and the fit there. The cost is linear in the
    number of points.
    """
    compute = _ascending(compute)
    bins, position, fit = _local_lines(compute, values, learning_rate)
    number = np.bincount(bins)
    place = np.bincount(bins, position)[number > 0] / number[number > 0]
    mean_log = np.bincount(bins, np.log10(compute))[number > 0] / number[number > 0]
    first = np.unique(bins, return_index=True)[1]
    mean_position, mean_value, slope = (quantity[first] for quantity in fit)
    return 10**mean_log, mean_value + slope * (place - mean_position)


def smoothed(compute: np.ndarray, values: np.ndarray, learning_rate: np.ndarray | None = None) -> np.ndarray:
    """The fit of `smooth` at every point: float64, of the shape of `values`."""
    _, position, (mean_position, mean_value, slope) = _local_lines(_ascending(compute), values, learning_rate)
    return mean_value + slope * (position - mean_position)


def _ascending(compute: np.ndarray) -> np.ndarray:
    """Compute that falls nowhere and is above zero, as it is unless two journals are in one file."""
    return np.maximum.accumulate(np.maximum(compute, ONE_OPERATION))


def _local_lines(
    compute: np.ndarray, values: np.ndarray, learning_rate: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each point: its bin, its position (in windows), and its line: mean position, mean value, slope."""
    position = np.log10(compute / compute[0]) / DECADES
    if learning_rate is not None:
        changes = np.nan_to_num(np.abs(np.diff(learning_rate, prepend=learning_rate[:1])))
        peak = np.nanmax(learning_rate, initial=0)
        position += np.cumsum(changes) / (RATE * peak) if peak > 0 else 0
    bins = np.round(position * _PER_WINDOW).astype(int)
    reach = 3 * _PER_WINDOW
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _PER_WINDOW) ** 2)

    def windowed(quantity: np.ndarray) -> np.ndarray:
        return np.convolve(np.pad(np.bincount(bins, quantity), reach), window, mode="valid")[bins]

    weight = windowed(np.ones_like(values))
    mean_position, mean_value = windowed(position) / weight, windowed(values) / weight
    variance = windowed(position**2) / weight - mean_position**2
    covariance = windowed(position * values) / weight - mean_position * mean_value
    slope = np.where(variance > 1e-6, covariance / np.maximum(variance, 1e-6), 0.0)
    return bins, position, (mean_position, mean_value, slope)
