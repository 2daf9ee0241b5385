"""Small seeded models for checks and tests."""

from __future__ import annotations

from dataclasses import replace

import torch

from hpcm_scale.config.compose import compose_model
from hpcm_scale.config.schema import ModelConfig, RateConfig
from hpcm_scale.model.hpcm import HPCM


def small_1b() -> ModelConfig:
    """The 1b's kind of network (blocks after the latent's convolution, refined priors, no fusion), narrow."""
    config = compose_model("1b")
    config.channels, config.latent_channels, config.hyper_latent_channels, config.hyper_channels = [8, 8, 8], 16, 8, 8
    config.g_a_blocks = config.g_s_blocks = [1, 1, 1, 1]
    config.hyper_blocks, config.adaptor_blocks = [1, 1], [1, 1, 1]
    for prior in (config.prior_s1_s2, config.prior_s3):
        prior.before = prior.after = prior.refine = 1
    return config


def spread_nano(seed: int, levels: int = 1) -> HPCM:
    """A nano whose scales lie in all tables, with many symbols beyond them: escapes and shifts occur.

    With several levels, gains differ between channels, and channel scales between levels.
    """
    torch.manual_seed(seed)
    model = HPCM(replace(compose_model("nano"), rate=RateConfig(levels=levels))).eval()
    with torch.no_grad():
        for prior in (model.context.prior_s1_s2, model.context.prior_s3):
            last = prior.after[-1]
            half = last.out_channels // 2
            last.bias[:half] = torch.linspace(-3, 4, half).exp()
            last.weight[:half] += torch.randn_like(last.weight[:half]) * 0.5 / last.in_channels**0.5
        channels = model.hyper_prior.scales.numel()
        model.hyper_prior.scales.copy_(torch.linspace(-2, 3, channels).exp().reshape(1, -1, 1, 1))
        model.hyper_prior.means.copy_(torch.randn(1, channels, 1, 1))
        if levels > 1:
            model.context.gains.log += 0.2 * torch.randn_like(model.context.gains.log[0])
            for scale in model.context.q:
                scale.weight += 0.05 * torch.randn_like(scale.weight)
    return model
