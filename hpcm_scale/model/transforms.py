"""The transforms g_a, g_s, h_a and h_s (arXiv 2507.19125, figure 3).

Each layer is fully initialized before the next one is made: ZeRO-3 may shard it then (`training.engines.deepspeed`).
"""

from __future__ import annotations

import torch
from torch import nn

from hpcm_scale.config.schema import ModelConfig
from hpcm_scale.model.families import blocks
from hpcm_scale.model.layers import down, up

INITIAL_SPREAD = 8
"""Initial standard deviation of y over that of the image, so that y does not round to zero."""


def start_scales(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
    """Initialize the biases of the first half of the outputs, the scales, to 1: well above their lower bound."""
    assert convolution.bias is not None
    nn.init.ones_(convolution.bias[: len(convolution.bias) // 2])
    return convolution


def _scale(convolution: nn.Conv2d | nn.ConvTranspose2d, factor: float) -> None:
    with torch.no_grad():
        convolution.weight.mul_(factor)


def analysis(config: ModelConfig) -> nn.Sequential:
    """g_a: image x (B, 3, H, W) to y (B, M, H/16, W/16), fp32."""
    widths = [3, *config.channels, config.latent_channels]
    layers: list[nn.Module] = []
    for level, count in enumerate(config.g_a_blocks):
        inputs, outputs = widths[level], widths[level + 1]
        kernel = config.stem_kernel if level == 0 else 2
        convolution = down(inputs, outputs, kernel=kernel, fp32=level == 3)
        if level == 3:
            _scale(convolution, INITIAL_SPREAD)
        layers += [convolution, *blocks(config, outputs, level + 1, count)]
    return nn.Sequential(*layers)


def synthesis(config: ModelConfig) -> nn.Sequential:
    """g_s: ŷ (B, M, H/16, W/16) to x̂ (B, 3, H, W), fp32, not clamped."""
    widths = [config.latent_channels, *reversed(config.channels), 3]
    layers: list[nn.Module] = []
    for level, count in enumerate(config.g_s_blocks):
        inputs, outputs = widths[level], widths[level + 1]
        kernel = config.stem_kernel if level == 3 else 2
        layers += blocks(config, inputs, 4 - level, count)
        convolution = up(inputs, outputs, kernel=kernel, fp32=level == 3)
        layers.append(convolution)
        if level == 0:
            _scale(convolution, 1 / INITIAL_SPREAD)
        elif level == 3:
            _scale(convolution, 0.1)
            assert convolution.bias is not None
            nn.init.constant_(convolution.bias, 0.5)  # untrained, x̂ is mid-grey
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
