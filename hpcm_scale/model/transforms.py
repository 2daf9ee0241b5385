"""Analysis and synthesis: image to latent y, y to hyper-latent z, and back.

A layer gets all of its first values before the next one is made: then it may be sharded (`training.deepspeed_engine`).
"""

from __future__ import annotations

import torch
from torch import nn

from hpcm_scale.config.schema import ModelConfig
from hpcm_scale.model.families import blocks
from hpcm_scale.model.layers import down, up

INITIAL_SPREAD = 8
"""y of an untrained model is this much wider than the image, so that rounding leaves something of it."""


def start_scales(convolution: nn.Module) -> nn.Module:
    """Let the first half of the outputs, the scales, start at 1: well above their bound, where rates have slopes."""
    nn.init.ones_(convolution.bias[: len(convolution.bias) // 2])
    return convolution


def _scale(convolution: nn.Module, factor: float) -> None:
    with torch.no_grad():
        convolution.weight.mul_(factor)


def analysis(config: ModelConfig) -> nn.Sequential:
    """g_a: image (B, 3, H, W) to y (B, M, H/16, W/16), fp32."""
    widths = [3, *config.channels, config.latent_channels]
    layers: list[nn.Module] = []
    for level, count in enumerate(config.g_a_blocks):
        inputs, outputs = widths[level], widths[level + 1]
        kernel = config.stem_kernel if level == 0 else 2
        layers.append(down(inputs, outputs, kernel=kernel, fp32=level == 3))
        if level == 3:
            _scale(layers[-1], INITIAL_SPREAD)
        layers += blocks(config, outputs, level + 1, count)
    return nn.Sequential(*layers)


def synthesis(config: ModelConfig) -> nn.Sequential:
    """g_s: ŷ (B, M, H/16, W/16) to the reconstruction (B, 3, H, W), fp32, not clamped."""
    widths = [config.latent_channels, *reversed(config.channels), 3]
    layers: list[nn.Module] = []
    for level, count in enumerate(config.g_s_blocks):
        inputs, outputs = widths[level], widths[level + 1]
        kernel = config.stem_kernel if level == 3 else 2
        layers += blocks(config, inputs, 4 - level, count)
        layers.append(up(inputs, outputs, kernel=kernel, fp32=level == 3))
        if level == 0:
            _scale(layers[-1], 1 / INITIAL_SPREAD)
    _scale(layers[-1], 0.1)
    nn.init.constant_(layers[-1].bias, 0.5)  # an untrained codec answers mid-grey, not black or noise
    return nn.Sequential(*layers)


def hyper_analysis(config: ModelConfig) -> nn.Sequential:
    """h_a: y (B, M, H/16, W/16) to z (B, N, H/64, W/64), fp32."""
    outer, inner = config.hyper_blocks
    y, middle, z = config.latent_channels, config.hyper_channels, config.hyper_latent_channels
    return nn.Sequential(
        *blocks(config, y, 4, outer, hyper=True),
        down(y, middle),
        *blocks(config, middle, 5, inner, hyper=True),
        down(middle, z, fp32=True),
    )


def hyper_synthesis(config: ModelConfig) -> nn.Sequential:
    """h_s: ẑ (B, N, H/64, W/64) to the hyper parameters (B, 2M, H/16, W/16), fp32: scales, then means."""
    outer, inner = config.hyper_blocks
    y, middle, z = config.latent_channels, config.hyper_channels, config.hyper_latent_channels
    return nn.Sequential(
        up(z, middle),
        *blocks(config, middle, 5, inner, hyper=True),
        start_scales(up(middle, 2 * y, fp32=True)),
        *blocks(config, 2 * y, 4, outer, hyper=True),
    )
