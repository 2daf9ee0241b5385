from __future__ import annotations

import numpy as np
import pytest
from law_surfaces import SIZES, floor_surface, size_points

from hpcm_scale.evaluation.bd_rate import compare
from hpcm_scale.evaluation.points import find_curves
from hpcm_scale.scaling.analysis import rate_change, rate_gain
from hpcm_scale.scaling.laws.fits import fit_power_law, fit_saturating_power_law

LAMBDAS = np.array([0.0018, 0.0035, 0.0067, 0.013, 0.025, 0.0483])


def test_on_published_curves_it_is_close_to_the_bd_rate():
    """HPCM-Base to -Large on Kodak: −4.27 % of BD-rate, −4.5 % by the losses at λ = 0.013; ΔL/L would say −2.5 %."""
    base, large = (find_curves(f"kodak/hpcm-{name}")[0] for name in ("base", "large"))
    bd_rate = compare(large, base).bd_rate
    assert bd_rate == pytest.approx(-4.27, abs=0.01)
    losses = [LAMBDAS * 255**2 * 10 ** (-np.array(curve.psnr) / 10) + np.array(curve.bpp) for curve in (base, large)]
    at = 3
    assert 100 * rate_change((losses[1] - losses[0])[at], base.bpp[at]) == pytest.approx(-4.5, abs=0.05)
    assert abs(100 * ((losses[1] - losses[0]) / losses[0])[at]) < 2.6


def test_on_a_known_curve_it_is_the_change_of_rate():
    """R(D) = −log2(D)·s on both, one with 3 % fewer bits everywhere near the working point."""
    lmbda, share = 0.013, 0.97
    distortion = np.geomspace(5, 100, 100_001)
    rate = 0.9 - 0.15 * np.log(distortion)
    losses = [np.min(lmbda * distortion + part * rate) for part in (1, share)]
    working = rate[np.argmin(lmbda * distortion + rate)]
    assert rate_change(losses[1] - losses[0], working) == pytest.approx(share - 1, rel=0.02)


def test_the_interval_is_carried_through():
    loss = floor_surface(SIZES, 0.4) * np.exp(0.003 * np.random.default_rng(0).standard_normal(SIZES.size))
    for fit in (fit_power_law, fit_saturating_power_law):
        law = fit(size_points(loss))
        gain = rate_gain(law, "small", SIZES[-1], 0.25)
        start, end = law.predict(SIZES[-1] * np.array([1, 10])).value
        assert gain.change == pytest.approx((end - start) / 0.25)
        assert gain.low < gain.change < gain.high
        narrower = rate_gain(law, "small", SIZES[-1], 0.25, level=0.5)
        assert gain.low < narrower.low < narrower.high < gain.high
        # No wider than if the errors of both ends were independent, no narrower than the noise of one training.
        ahead = law.predict(10 * SIZES[-1])
        assert (gain.high - gain.low) * 0.25 < 1.5 * (ahead.high - ahead.low)


def test_no_more_than_all_can_be_saved():
    wild = fit_power_law(size_points(np.array([1.0, 3.0, 0.4, 2.0, 0.3, 1.0])))
    gain = rate_gain(wild, "small", SIZES[-1], 0.1)
    assert gain.low == -1 and gain.change < -1
    assert gain.sentence.endswith("first order is not valid")


def test_the_sentence():
    law = fit_power_law(size_points(np.array([1.0, 0.9, 0.82, 0.73, 0.66, 0.6])))
    gain = rate_gain(law, "small", SIZES[-1], 0.5)
    low, change, high = (f"{100 * abs(value):.1f}" for value in (gain.low, gain.change, gain.high))
    assert gain.sentence == f"10× parameters: bitrate −{change} % (95 %: −{low} %…−{high} %)"
    two = rate_gain(fit_power_law(size_points(np.array([1.0, 0.8]), SIZES[:2])), "nano", SIZES[1], 0.5, factor=2.5)
    assert (two.low, two.high) == (None, None)
    assert two.sentence.startswith("2.5× parameters: bitrate −")
    assert two.sentence.endswith("% (no interval)")
