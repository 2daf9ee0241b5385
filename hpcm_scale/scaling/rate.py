"""From loss to rate: what a lower loss is worth in bits at equal quality."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpcm_scale.scaling.laws.law import Law


@dataclass(frozen=True)
class RateGain:
    """Relative change of bitrate that a larger model promises at equal quality."""

    law: str
    """Name of the law it rests on."""
    model: str
    """Name of the reference model."""
    parameters: float
    """Of the reference model."""
    factor: float
    """How many times its parameters."""
    bpp: float
    """Rate of the reference model, bits per pixel."""
    level: float
    """Probability of the interval."""
    change: float
    """ΔR/R; −0.05 is 5 % fewer bits."""
    low: float | None
    """The end of the interval with the larger saving, −1 at least: there is no more to save than all. None where the
    law has no interval."""
    high: float | None

    @property
    def sentence(self) -> str:
        """Like "10× parameters: bitrate −5.0 % (95 %: −7.1…−2.9 %)"; a saving of more than all is told as too much."""
        if self.change <= -1:
            return f"{self.factor:g}× parameters: a loss lower by more than the whole bitrate, too far for first order"
        start = f"{self.factor:g}× parameters: bitrate {_percent(self.change)} %"
        if self.low is None or self.high is None:
            return f"{start} (no interval)"
        return f"{start} ({100 * self.level:g} %: {_percent(self.low)}…{_percent(self.high)} %)"


def rate_change(loss_change: float, bpp: float) -> float:
    """ΔR/R ≈ ΔL/R_bpp, the change of rate at equal quality that a change of L = λ·255²·MSE + R at fixed λ is worth.

    Both models sit where their rate-distortion curve has slope −λ, so the vertical distance of the curves, in bits per
    pixel, is the difference of their losses to first order: ΔL is shared by rate and distortion, and all of it counts
    as rate. ΔL/L would be too small by the part that distortion has of the loss.
    """
    return loss_change / bpp


def rate_gain(law: Law, model: str, parameters: float, bpp: float, factor: float = 10, level: float = 0.95) -> RateGain:
    """The change of bitrate when a law L(N) goes from `parameters` to `factor` times as many (`Law.change`).

    Args:
        law: a law of parameters.
        model: name of the reference model.
        parameters: of the reference model.
        bpp: rate of the reference model, bits per pixel.
        factor: how many times its parameters.
        level: probability that the interval holds one new training.
    """
    change, low, high = law.change(parameters, factor * parameters, level)
    bounds = [None if math.isnan(bound) else max(rate_change(bound, bpp), -1.0) for bound in (low, high)]
    return RateGain(law.name, model, parameters, factor, bpp, level, rate_change(change, bpp), *bounds)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:+.1f}".replace("-", "−")
