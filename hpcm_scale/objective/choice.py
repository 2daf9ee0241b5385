"""Which rate-distortion loss goes with a distortion."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hpcm_scale.config.schema import Distortion
from hpcm_scale.objective.ms_ssim import SimilarityObjective
from hpcm_scale.objective.rate_distortion import RateDistortionObjective


def objective_of(distortion: Distortion, lmbda: float | Callable[[Tensor], Tensor]) -> RateDistortionObjective:
    """What is trained for; `lmbda`: λ, or with variable rate what gives it, (B,), for levels (B,)."""
    kinds = {Distortion.mse: RateDistortionObjective, Distortion.ms_ssim: SimilarityObjective}
    return kinds[distortion](lmbda)
