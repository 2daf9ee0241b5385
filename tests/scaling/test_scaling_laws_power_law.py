from __future__ import annotations

import numpy as np
import pytest
from law_surfaces import SIZES, columns, points_of, size_points
from scipy import stats

from hpcm_scale.scaling.laws.fits import fit_power_law
from hpcm_scale.scaling.laws.law import CannotFit


def test_it_is_linregress_to_the_last_digit():
    loss = 3 * SIZES**-0.12 * np.exp(0.02 * np.random.default_rng(0).standard_normal(SIZES.size))
    line, law = stats.linregress(np.log(SIZES), np.log(loss)), fit_power_law(size_points(loss))
    assert law.parameters == {"A": np.exp(line.intercept), "alpha": -line.slope}
    assert law.r == line.rvalue
    assert law.standard_errors["alpha"] == line.stderr
    assert law.standard_errors["A"] == np.exp(line.intercept) * line.intercept_stderr
    assert law.name == "power_law_of_parameters"
    assert law.degrees_of_freedom == 4


def test_its_interval_is_the_textbook_one():
    """ŷ ± t·s·√(1 + 1/n + (x − x̄)²/Sxx), in the logarithm."""
    loss = 3 * SIZES**-0.12 * np.exp(0.02 * np.random.default_rng(1).standard_normal(SIZES.size))
    law, at = fit_power_law(size_points(loss)), np.array([1e6, 2e8])
    x, y = np.log(SIZES), np.log(loss)
    slope, intercept = np.polyfit(x, y, 1)
    deviation = np.sqrt(np.sum((y - intercept - slope * x) ** 2) / 4)
    spread = deviation * np.sqrt(1 + 1 / 6 + (np.log(at) - x.mean()) ** 2 / np.sum((x - x.mean()) ** 2))
    for level in (0.5, 0.95):
        value, low, high = law.predict(at, level)
        half = stats.t.ppf((1 + level) / 2, 4) * spread
        np.testing.assert_allclose(value, np.exp(intercept + slope * np.log(at)), rtol=1e-12)
        np.testing.assert_allclose([low, high], np.exp(intercept + slope * np.log(at) + [-half, half]), rtol=1e-9)
    assert isinstance(law.predict(1e6).low, float)


def test_the_interval_of_a_ratio_is_that_of_the_slope():
    """log L(b)/L(a) = −α·log(b/a) ± t·√(s² + (σ_α·log(b/a))²): the error of A cancels."""
    loss = 3 * SIZES**-0.12 * np.exp(0.02 * np.random.default_rng(1).standard_normal(SIZES.size))
    law, t = fit_power_law(size_points(loss)), stats.t.ppf(0.975, 4)
    for step in (1, 10, 0.1):
        found = law.ratio(1e7, step * 1e7)
        spread = np.hypot(law.residual_deviation, law.standard_errors["alpha"] * np.log(step))
        assert np.log(found.value) == pytest.approx(-law.parameters["alpha"] * np.log(step))
        assert np.log(found.high / found.value) == pytest.approx(t * spread)
        assert np.log(found.value / found.low) == pytest.approx(t * spread)


def test_the_slopes_porian_and_others_published(shared):
    """Resolving discrepancies in compute-optimal scaling (arXiv 2406.19146): log n on log flops."""
    for config, slope in enumerate((0.83377, 0.70090, 0.60353, 0.57142, 0.49703)):
        path = shared / "known_answers" / "porian_rw_optimal_pairs.csv"
        flops, best = columns(path, "flops", "n", config=str(config))
        law = fit_power_law(points_of(best, "compute", C=flops))
        assert -law.parameters["alpha"] == pytest.approx(slope, abs=5e-6)
        assert any("does not fall with C" in warning for warning in law.warnings)


def test_two_points_have_no_interval_and_one_no_law():
    law = fit_power_law(size_points(np.array([2.0, 1.0]), SIZES[:2]))
    assert law.predict(SIZES[:2]).value == pytest.approx([2.0, 1.0])
    assert np.isnan(law.predict(1e8).low)
    assert np.isnan(law.predict(1e8).high)
    assert (law.standard_errors, law.residual_deviation) == (None, None)
    assert "two points determine a power law exactly: it has no interval" in law.warnings
    with pytest.raises(CannotFit, match="needs two different N, and there is 1"):
        fit_power_law(size_points(np.array([2.0, 1.9]), np.array([1e6, 1e6 + 1])))


def test_points_must_be_positive_numbers():
    for loss in (np.nan, 0.0, -1.0, np.inf):
        with pytest.raises(ValueError, match="positive finite"):
            size_points(np.array([1.0, loss]), SIZES[:2])
