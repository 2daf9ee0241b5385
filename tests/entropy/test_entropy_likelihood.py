"""The likelihood against exact values; its behaviour for any finite number; its bounds."""

from __future__ import annotations

import json
import math

import mpmath
import numpy as np
import pytest
import torch
from entropy_reference import probability, slopes
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcm_scale.entropy.generalized_gaussian import LIKELIHOOD_BOUND, SCALE_BOUND, bits, likelihood

TOLERANCE = 3e-5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def dense_grid() -> tuple[np.ndarray, np.ndarray]:
    """Residuals and scales in fp32: 140 scales from 0.12 to 64, and each bin down to far below 1e-30."""
    scales = np.geomspace(0.12, 64, 140)
    steps = np.linspace(0, 17, 1200)
    near_mode = np.concatenate([np.linspace(0, 1.6, 600), np.geomspace(1e-30, 1, 60)])
    near_edge = 0.5 + np.geomspace(1e-7, 0.4, 60) * np.array([[-1], [1]])
    rows = [np.concatenate([steps * s, steps * s + 0.5, near_mode, near_edge.ravel()]) for s in scales]
    residual = np.stack(rows).astype(np.float32)
    return residual, np.broadcast_to(scales.astype(np.float32)[:, None], residual.shape).copy()


def values_and_slopes(residual, scale, formula="survival", device="cpu"):
    residual = torch.tensor(residual, dtype=torch.float32, device=device, requires_grad=True)
    scale = torch.tensor(scale, dtype=torch.float32, device=device, requires_grad=True)
    value = likelihood(residual, scale, formula)
    by_residual, by_scale = torch.autograd.grad(value.sum(), (residual, scale))
    return (tensor.detach().double().cpu().numpy() for tensor in (value, by_residual, by_scale))


def test_reference_agrees_with_forty_digits():
    generator = np.random.default_rng(0)
    scale = np.geomspace(0.12, 64, 60)
    for residual in (generator.uniform(0, 1, 60), generator.uniform(0.5, 17, 60) * scale):
        for v, s, found in zip(residual, scale, probability(residual, scale), strict=True):
            with mpmath.workdps(40):
                edges = [(mpmath.mpf(v) - 0.5) / s, (mpmath.mpf(v) + 0.5) / s]
                x, y = (abs(edge) ** 1.5 for edge in edges)
                sign = 1 if edges[0] >= 0 else -1
                exact = mpmath.gammainc(mpmath.mpf(2) / 3, 0, y) - sign * mpmath.gammainc(mpmath.mpf(2) / 3, 0, x)
                exact /= 2 * mpmath.gamma(mpmath.mpf(2) / 3)
            assert found == pytest.approx(float(exact), rel=1e-11, abs=0)


@pytest.mark.parametrize("device", DEVICES)
def test_accuracy_over_a_dense_grid(device):
    residual, scale = dense_grid()
    value, by_residual, by_scale = values_and_slopes(residual, scale, device=device)
    residual, scale = residual.astype(np.float64), scale.astype(np.float64)
    exact = probability(residual, scale)
    exact_by_residual, exact_by_scale, balance = slopes(residual, scale)
    inside = exact >= 1e-30
    assert not inside[:, 2399].any(), "the grid reaches below 1e-30 at every scale"

    error = np.abs(value / exact - 1)
    assert error[inside].max() <= TOLERANCE
    assert error[exact >= LIKELIHOOD_BOUND].max() <= 1e-5
    assert (np.abs(by_residual - exact_by_residual) <= TOLERANCE * np.abs(exact_by_residual))[inside].all()
    # The slope by scale changes sign: there it is exact to 3e-7 of the two terms that balance.
    error = np.abs(by_scale - exact_by_scale)
    assert (error <= TOLERANCE * np.abs(exact_by_scale) + 3e-7 * balance)[inside].all()


@pytest.mark.parametrize("scale", [2e3, 1e4, 1e6])
def test_accuracy_does_not_end_at_the_widest_table(scale):
    # A bin this narrow is its width times the density f at its middle; its slope is f' = −1.5·√t·f.
    t = np.linspace(0.01, 15, 5000).astype(np.float32)
    value, by_residual, _ = values_and_slopes(t * np.float32(scale), np.full(len(t), scale))
    t = (t * np.float32(scale)).astype(np.float64) / scale
    density = 1.5 / (2 * math.gamma(2 / 3)) * np.exp(-(t**1.5)) / scale
    np.testing.assert_allclose(value, density, rtol=TOLERANCE)
    np.testing.assert_allclose(by_residual, -1.5 * np.sqrt(t) * density / scale, rtol=TOLERANCE)


@pytest.mark.launch
def test_gradcheck_in_float64():
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(200, generator=generator, dtype=torch.float64) * 3 + 0.2
    residual = torch.randn(200, generator=generator, dtype=torch.float64) * scale
    residual[:3] = torch.tensor([0.0, 0.5, -0.5])
    arguments = (residual.requires_grad_(), scale.requires_grad_())
    for function in (likelihood, bits, lambda v, s: likelihood(v, s, "public")):
        assert torch.autograd.gradcheck(function, arguments, eps=1e-6, atol=2e-5, rtol=1e-3)


@settings(deadline=None)
@given(finite, finite)
def test_finite_for_all_finite_floats(residual, scale):
    for formula in ("survival", "public"):
        value, by_residual, by_scale = values_and_slopes([residual], [scale], formula)
        assert value <= 1
        assert np.isfinite(by_residual) and np.isfinite(by_scale)
        if formula == "survival":
            assert value >= 0
            opposite, opposite_by_residual, opposite_by_scale = values_and_slopes([-residual], [scale])
            assert (opposite, opposite_by_residual, opposite_by_scale) == (value, -by_residual, by_scale)
        arguments = [torch.tensor([x], dtype=torch.float32, requires_grad=True) for x in (residual, scale)]
        cost = bits(*arguments, formula)
        cost.sum().backward()
        assert 0 <= cost.item() <= 29.9
        assert all(torch.isfinite(argument.grad).all() for argument in arguments)


@pytest.mark.parametrize("formula", ["survival", "public"])
@pytest.mark.parametrize("device", DEVICES)
def test_finite_for_a_million_bit_patterns(formula, device):
    patterns = np.random.default_rng(0).integers(0, 2**32, (2, 1_000_000), dtype=np.uint32)
    residual, scale = patterns.view(np.float32)
    # Random exponents hardly ever make a bin that is neither 0 nor 1: half of the scales are ordinary.
    scale = np.where(np.arange(len(scale)) % 2, scale, np.float32(0.12) + scale.view(np.uint32) / 2**27)
    both = np.isfinite(residual) & np.isfinite(scale)
    value, by_residual, by_scale = values_and_slopes(residual[both], scale[both], formula, device)
    rounding = 0 if formula == "survival" else 1e-6  # the public difference may fall below 0
    assert ((value >= -rounding) & (value <= 1)).all()
    assert np.isfinite(by_residual).all() and np.isfinite(by_scale).all()


@pytest.mark.parametrize("flush", [False, True], ids=["denormals", "denormals flushed"])
@pytest.mark.parametrize("scale", [3.4e38, 1e38, 1.0, 0.12, 1e-38, 1e-45, 0.0, -0.0, -5.0, -3.4e38])
def test_finite_at_the_ends_of_the_number_line(scale, flush):
    ends = [0.0, 1e-45, 1e-38, 0.5, 0.50000006, 1.0, 1e4, 1e19, 1e38, 3.4e38]
    residual = np.array(ends + [-x for x in ends])
    if not torch.set_flush_denormal(flush):
        pytest.skip("this processor cannot flush denormal numbers to zero")
    try:
        for formula in ("survival", "public"):
            for result in values_and_slopes(residual, np.full(len(residual), scale), formula):
                assert np.isfinite(result).all()
    finally:
        torch.set_flush_denormal(False)


def test_not_a_number_stays_visible():
    nan, one = torch.tensor([math.nan]), torch.tensor([1.0])
    assert bits(nan, one).isnan().all() and bits(one, nan).isnan().all()


@pytest.mark.parametrize("scale", [0.05, 0.12, 0.5, 3.0, 64.0])
@pytest.mark.parametrize("offset", [0.0, 0.3, 0.5])
def test_probabilities_of_all_symbols_sum_to_one(scale, offset):
    symbols = torch.arange(-1500, 1501) - offset
    for dtype, tolerance in ((torch.float64, 4e-6), (torch.float32, 1e-5)):
        total = likelihood(symbols.to(dtype), torch.tensor(scale, dtype=dtype)).double().sum()
        assert total.item() == pytest.approx(1, abs=tolerance)


def test_bits_are_the_bounded_logarithm():
    residual = torch.tensor([0.0, 1.0, 5.0, 1000.0])
    scale = torch.tensor([1.0, 0.5, 2.0, 1.0])
    expected = -np.log2(np.maximum(probability(residual.double().numpy(), scale.double().numpy()), 1e-9))
    np.testing.assert_allclose(bits(residual, scale).numpy(), expected, rtol=1e-6)
    assert bits(residual, scale)[-1].item() == pytest.approx(-math.log2(LIKELIHOOD_BOUND), rel=1e-6)


def test_gradient_can_bring_values_back_above_the_bounds():
    # Likelihood under 1e-9: descent on the bits still draws the symbol in and the scale up.
    residual, scale = torch.tensor([3.5], requires_grad=True), torch.tensor([0.4], requires_grad=True)
    assert likelihood(residual, scale).item() < LIKELIHOOD_BOUND
    bits(residual, scale).sum().backward()
    assert residual.grad.item() > 0 and scale.grad.item() < 0
    # Ascent would lower it further: nothing passes.
    residual.grad = scale.grad = None
    (-bits(residual, scale)).sum().backward()
    assert residual.grad.item() == 0 and scale.grad.item() == 0

    # A scale under 0.12 counts as 0.12. A far symbol asks for a wider one and is heard …
    far, narrow = torch.tensor([1.0], requires_grad=True), torch.tensor([0.05], requires_grad=True)
    assert bits(far, narrow).item() == bits(far, torch.tensor([SCALE_BOUND])).item()
    bits(far, narrow).sum().backward()
    assert narrow.grad.item() < 0
    # … a symbol at the mode asks for a narrower one still and is not.
    narrow.grad = None
    bits(torch.tensor([0.4]), narrow).sum().backward()
    assert narrow.grad.item() == 0


def test_public_formula_cancels_where_the_survival_formula_does_not():
    residual, scale = torch.tensor([4.0]), torch.tensor([0.5])
    assert likelihood(residual, scale, "public").item() == 0
    assert likelihood(residual, scale).item() == pytest.approx(1.24e-9, rel=3e-3)


def test_public_formula_agrees_where_it_keeps_its_digits():
    residual, scale = dense_grid()
    value, by_residual, _ = values_and_slopes(residual, scale, "public")
    exact = probability(residual.astype(np.float64), scale.astype(np.float64))
    assert np.abs(value - exact).max() < 5e-7
    exact_by_residual, _, balance = slopes(residual.astype(np.float64), scale.astype(np.float64))
    assert (np.abs(by_residual - exact_by_residual) <= 1e-5 * balance * scale + 1e-6).all()


@pytest.mark.parametrize("name", ["base", "phi", "large", "1b"])
def test_rate_of_the_reference_latents(shared, name):
    arrays = np.load(shared / "reference" / f"{name}.npz")
    expected = json.loads((shared / "reference" / f"{name}.json").read_text())["eval"]["y_bpp"]
    symbols, scales = torch.from_numpy(arrays["y_q"]), torch.from_numpy(arrays["scales"])
    pixels = arrays["image"].shape[0] * arrays["image"].shape[1]
    public = bits(symbols, scales, "public").sum().item() / pixels
    assert public == pytest.approx(expected, rel=1e-6)
    # The public formula's tails, too dear, are the difference.
    assert bits(symbols, scales).sum().item() / pixels == pytest.approx(expected, rel=5e-3)


def test_precision_does_not_follow_autocast_or_half_inputs():
    residual = torch.linspace(-6, 6, 101, dtype=torch.bfloat16)
    scale = torch.full((101,), 1.5, dtype=torch.bfloat16)
    plain = likelihood(residual.float(), scale.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for formula in ("survival", "public"):
            assert bits(residual, scale, formula).dtype == torch.float32
        assert torch.equal(likelihood(residual, scale), plain)
    assert likelihood(residual.double(), scale).dtype == torch.float64
    residual.requires_grad_()
    bits(residual, scale).sum().backward()
    assert residual.grad.dtype == torch.bfloat16


def test_channel_scales_broadcast_and_gather_their_gradient():
    residual = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.3, 1.0, 4.0]).reshape(1, 3, 1, 1).requires_grad_()
    cost = bits(residual, scale)
    assert cost.shape == residual.shape
    cost.sum().backward()
    wide = scale.detach().expand_as(residual).clone().requires_grad_()
    bits(residual, wide).sum().backward()
    torch.testing.assert_close(scale.grad, wide.grad.sum(dim=(0, 2, 3), keepdim=True))


def test_unknown_formula_is_refused():
    with pytest.raises(ValueError, match="'survival' or 'public', not 'exact'"):
        likelihood(torch.zeros(1), torch.ones(1), "exact")
