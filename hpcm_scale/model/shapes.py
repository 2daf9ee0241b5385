"""What a model's shapes tell, without its memory: parameters and floating-point operations."""

from __future__ import annotations

import torch
from torch import nn

from hpcm_scale.compute.flops import forward_flops
from hpcm_scale.config.schema import ModelConfig
from hpcm_scale.model.hpcm import HPCM

_PARTS: dict[str, tuple[str, ...]] = {
    "g_a": ("g_a",),
    "g_s": ("g_s",),
    "hyper": ("h_a", "h_s", "hyper_prior"),
    "context": ("context",),
}


def on_meta(config: ModelConfig) -> HPCM:
    """The model without memory: shapes only."""
    with torch.device("meta"):
        return HPCM(config)


def parameter_count(model: nn.Module) -> int:
    """All parameters of a model or of a part of it."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_by_part(model: HPCM) -> dict[str, int]:
    """Parameter counts of g_a, g_s, hyper (h_a, h_s and the prior of z) and context, in that order."""
    return {part: sum(parameter_count(model.get_submodule(name)) for name in names) for part, names in _PARTS.items()}


def forward_flops_per_image(model: HPCM, side: int) -> int:
    """FLOPs (2 per multiply-accumulate) of coding one side×side image; `model` on `meta`."""
    return forward_flops(model, torch.empty(1, 3, side, side, device="meta"))


def kmac_per_pixel(flops: int, side: int) -> float:
    """Thousands of multiply-accumulates per pixel, from the FLOPs of a side×side image."""
    return flops / 2 / side**2 / 1e3
