"""A model that puts every part of the entropy coder to use."""

from __future__ import annotations

import torch

from hpcm_scale.config.compose import compose_model
from hpcm_scale.model.hpcm import HPCM


def spread_nano(seed: int) -> HPCM:
    """A nano whose scales lie in all tables, with many symbols beyond them: escapes and shifts occur."""
    torch.manual_seed(seed)
    model = HPCM(compose_model("nano")).eval()
    with torch.no_grad():
        for prior in (model.context.prior_s1_s2, model.context.prior_s3):
            last = prior.after[-1]
            half = last.out_channels // 2
            last.bias[:half] = torch.linspace(-3, 4, half).exp()
            last.weight[:half] += torch.randn_like(last.weight[:half]) * 0.5 / last.in_channels**0.5
        channels = model.hyper_prior.scales.numel()
        model.hyper_prior.scales.copy_(torch.linspace(-2, 3, channels).exp().reshape(1, -1, 1, 1))
        model.hyper_prior.means.copy_(torch.randn(1, channels, 1, 1))
    return model
