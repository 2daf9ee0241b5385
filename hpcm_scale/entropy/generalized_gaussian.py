"""Rate of a quantized latent under a generalized Gaussian with shape β = 1.5.

The density of the normalized residual is f(t) = c·exp(−|t|^β), c = β/(2Γ(1/β)). A symbol with residual v and scale s
costs −log2 of the likelihood of its unit bin, F((v+½)/s) − F((v−½)/s), F the cumulative distribution function. In fp32
this difference cancels in the tails and for large scales, so the likelihood is computed as follows.

By symmetry only |v| matters. Let Q be the survival function, H(t) = −ln 2Q(t) its cumulative hazard, and
a = (|v|−½)/s, b = (|v|+½)/s the edges of the bin. Then

    likelihood = ½·exp(−H(|a|))·(1 − exp(−(H(b) − H(|a|))))  +  [a < 0]·(1 − exp(−H(|a|))),

the mass from |a| to b, and that from a to |a| of a bin that contains the mode: a sum of positive terms, accurate with
`expm1` if H(b) − H(|a|) is. With u = √t, H(t) = u³ + h(u), where h is smooth and small, h(0) = h'(0) = 0. h is
approximated by a polynomial in the compact variable y = u/(u + 1/κ), and its difference is y_b − y_a times a divided
difference, not a difference of values. All operations are elementwise without branches, and the accuracy does not
depend on the scale.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor


class _LowerBound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(value >= bound)
        return value.clamp(min=bound)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (within,) = ctx.saved_tensors
        return torch.where(within | (gradient < 0), gradient, 0.0), None


def lower_bound(value: Tensor, bound: float) -> Tensor:
    """max(value, bound), with a gradient below the bound where descent would increase the value (gradient < 0).

    With the gradient of `clamp` such a value would stay below the bound forever. Same shape and dtype as `value`.
    """
    return _LowerBound.apply(value, bound)


SHAPE = 1.5
SCALE_BOUND = 0.12
LIKELIHOOD_BOUND = 1e-9

Formula = Literal["survival", "public"]

DENSITY_AT_MODE = SHAPE / (2 * math.gamma(1 / SHAPE))
# Beyond it the density is 0 even in float64; the clamp keeps its factors finite.
FARTHEST = 1e4
# Far below the root of any bin edge; avoids 0/0 for bins narrower than the smallest number.
TINY = 1e-30

COMPACTION = 0.5  # κ
# Of y², y³, …, y¹⁰ in h: minimax for the error of ln Q and of its slope, at most 3.0e-6 for u ≤ 4.2, where Q
# is 1e-33. Derived again in tests/entropy/test_entropy_fit.py.
HAZARD_COEFFICIENTS = (
    4.43094203,
    0.858783475,
    -0.76431606,
    -7.24080807,
    15.0608744,
    -72.2098369,
    189.72026,
    -203.230392,
    78.6119179,
)


def likelihood(residual: Tensor, scale: Tensor, formula: Formula = "survival") -> Tensor:
    """Probability of the unit bin around `residual` under a generalized Gaussian.

    Args:
        residual: symbol minus mean, in quantization steps; any shape.
        scale: broadcasts with `residual`; bounded below by SCALE_BOUND (`lower_bound`).
        formula: "survival" (default): value and gradient within 3e-5 of the exact ones down to 1e-30; "public": the
            difference of distribution functions of the public implementation, in fp32 0 or noise below about 1e-7,
            only for comparison.

    Returns:
        Probabilities without a lower bound, of the broadcast shape: float64 if an argument is, else fp32, also under
        autocast. Values and gradients are finite for finite arguments.

    Raises:
        ValueError: an unknown formula.
    """
    dtype = torch.promote_types(torch.promote_types(residual.dtype, scale.dtype), torch.float32)
    bounded = lower_bound(scale.to(dtype), SCALE_BOUND)
    residual, bounded = torch.broadcast_tensors(residual.to(dtype), bounded)
    if formula == "survival":
        return _BinProbability.apply(residual, bounded)
    if formula == "public":
        residual = residual.clamp(-1e20, 1e20)  # no power below overflows
        upper = _Distribution.apply((residual + 0.5) / bounded)
        return upper - _Distribution.apply((residual - 0.5) / bounded)
    raise ValueError(f"formula is 'survival' or 'public', not {formula!r}")


def bits(residual: Tensor, scale: Tensor, formula: Formula = "survival") -> Tensor:
    """Bits of each symbol: −log2 of its `likelihood`, bounded below by LIKELIHOOD_BOUND (`lower_bound`).

    Arguments, shape and dtype as in `likelihood`; values are between 0 and 29.9.
    """
    return -torch.log2(lower_bound(likelihood(residual, scale, formula), LIKELIHOOD_BOUND))


def _bin(residual: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """The bin around |residual|: a, b, √|a|, √b and, without cancellation, √b − √|a| and b^1.5 − |a|^1.5."""
    magnitude = residual.abs()
    near = ((magnitude - 0.5) / scale).clamp(max=FARTHEST)
    far = ((magnitude + 0.5) / scale).clamp(max=FARTHEST)
    distance = near.abs()
    near_root, far_root = distance.sqrt(), far.sqrt()
    width = (2 * magnitude).clamp(max=1) / scale  # b − |a|
    root_width = width / (near_root + far_root + TINY)
    growth = root_width * (distance + near_root * far_root + far)
    return near, far, near_root, far_root, root_width, growth


class _BinProbability(torch.autograd.Function):
    """The likelihood of the module's docstring; saves only its arguments for the backward pass."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(residual, scale)
        near, _, near_root, far_root, root_width, growth = _bin(residual, scale)
        near_rest = 1 / (1 + COMPACTION * near_root)  # 1 − y
        far_rest = 1 / (1 + COMPACTION * far_root)
        y_near = COMPACTION * near_root * near_rest
        y_far = COMPACTION * far_root * far_rest
        y_width = COMPACTION * root_width * near_rest * far_rest

        # Horner's rule for h at y_near, and for its divided difference between y_near and y_far.
        value = torch.full_like(y_near, HAZARD_COEFFICIENTS[-1])
        slope = torch.zeros_like(y_near)
        for coefficient in (*HAZARD_COEFFICIENTS[-2::-1], 0.0, 0.0):
            slope = torch.addcmul(value, slope, y_far)
            value = value * y_near + coefficient

        hazard = near_root * near.abs() + value
        beyond = -0.5 * torch.exp(-hazard) * torch.expm1(-(growth + y_width * slope))
        around_mode = torch.where(near < 0, -torch.expm1(-hazard), 0.0)
        return beyond + around_mode

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        residual, scale = ctx.saved_tensors
        near, far, near_root, _, _, growth = _bin(residual, scale)
        common = gradient * DENSITY_AT_MODE * torch.exp(-near_root * near.abs()) / scale
        decline = torch.expm1(-growth)  # f(b)/f(a) − 1
        # (b·f(b) − a·f(a))/f(a), without cancellation near the mode and for narrow bins.
        spread = torch.where(residual.abs() < 1.5, far * torch.exp(-growth) - near, 1 / scale + far * decline)
        return common * decline * residual.sign(), -common * spread


class _Distribution(torch.autograd.Function):
    """F(t) by the incomplete gamma function, whose gradient in torch is infinite at 0."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        order = torch.full((), 1 / SHAPE, dtype=value.dtype, device=value.device)
        return 0.5 * (1 + value.sign() * torch.special.gammainc(order, value.abs().pow(SHAPE)))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (value,) = ctx.saved_tensors
        return gradient * DENSITY_AT_MODE * torch.exp(-value.abs().pow(SHAPE))
