"""Models of every kind, small enough for seconds."""

from __future__ import annotations

from dataclasses import replace

import torch

from hpcm_scale.config.schema import Fusion, HyperPlacement, ModelConfig, PriorConfig
from hpcm_scale.model.hpcm import HPCM, Noise
from hpcm_scale.objective import rate_distortion_loss


def small(fusion: Fusion = Fusion.attention, placement: HyperPlacement = HyperPlacement.aligned) -> ModelConfig:
    """A 68m in little."""
    return ModelConfig(
        name="small",
        channels=[8, 8, 16],
        latent_channels=16,
        hyper_latent_channels=8,
        hyper_channels=8,
        g_a_blocks=[1, 1, 1, 0],
        g_s_blocks=[0, 1, 1, 1],
        hyper_blocks=[1, 1],
        attention_heads=2,
        prior_s1_s2=PriorConfig(before=1, after=1),
        prior_s3=PriorConfig(before=1, after=1),
        fusion=fusion,
        hyper_placement=placement,
    )


def with_few_shapes(fusion: Fusion = Fusion.attention) -> ModelConfig:
    """`small` with blocks at fewer resolutions: each shape of a region is compiled on its own."""
    return replace(small(fusion), g_a_blocks=[0, 0, 1, 0], g_s_blocks=[0, 1, 0, 0], hyper_blocks=[0, 1])


def images(count: int, height: int = 256, width: int = 256, seed: int = 0) -> torch.Tensor:
    """Random images, channels last."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, height, width, generator=generator).contiguous(memory_format=torch.channels_last)


def noise(model: HPCM, x: torch.Tensor, seed: int = 1) -> Noise:
    """Noise for these images."""
    generator = torch.Generator().manual_seed(seed)
    shapes = model.latent_shapes(*x.shape[2:])
    return Noise(*(torch.rand((len(x), *shape), generator=generator) - 0.5 for shape in shapes))


def loss_and_gradients(model: HPCM, x: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one training step."""
    model.zero_grad()
    coded = model(x, noise(model, x))
    loss = rate_distortion_loss(x, coded.x_hat, coded.bits_y, coded.bits_z, 0.013).loss.mean()
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
