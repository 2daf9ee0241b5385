"""Estimated rate and distortion from a forward pass, for one image or for a set shared out over the processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcm_scale.data.image_set import ImageSet
from hpcm_scale.evaluation.measures import peak_signal_to_noise
from hpcm_scale.model.hpcm import Coded
from hpcm_scale.objective.rate_distortion import RateDistortion, rate_distortion_loss

Forward = Callable[[Tensor], Coded]
"""A model's forward pass, or an engine's around it."""


@dataclass(frozen=True)
class ImageResult:
    """One image: rates per own pixel; PSNR on 8-bit rounded pixels; loss with the unrounded error."""

    name: str
    width: int
    height: int
    loss: float
    """λ·255²·MSE + bpp, the reconstruction neither clamped nor rounded, as in training."""
    bpp: float
    bpp_y: float
    bpp_z: float
    mse: float
    psnr: float
    """dB, the reconstruction clamped and rounded to 8 bits."""


class Reconstruction(NamedTuple):
    """An image beside what the codec made of it, both uint8 (3, H, W)."""

    original: Tensor
    reconstruction: Tensor
    result: ImageResult


@dataclass(frozen=True)
class Evaluation:
    """The results of a set, in its order, and the reconstructions this process kept."""

    images: list[ImageResult]
    reconstructions: list[Reconstruction]

    def mean(self) -> dict[str, float]:
        """Means over the images; the PSNR is the mean of the images' PSNRs, the field's habit."""
        keys = ("loss", "bpp", "bpp_y", "bpp_z", "mse", "psnr")
        return {key: math.fsum(asdict(image)[key] for image in self.images) / len(self.images) for key in keys}


@torch.no_grad()
def evaluate(
    codec: Forward,
    images: ImageSet,
    *,
    multiple: int,
    lmbda: float,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda values: values,
    keep: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Code every image once and measure it; every process calls it and gets all results.

    Images are padded at the right and bottom, by replication, to multiples of `multiple` pixels, and
    counted by their own pixels. Each process takes every `world_size`-th image and calls the codec equally
    often (a sharded model needs all of them at every call); `reduce` sums a tensor over the processes. Up
    to `keep` of this process's images come back with their reconstructions. `progress` is called after each image.
    """
    table = torch.zeros(len(images), 8, dtype=torch.float64)
    kept: list[tuple[int, Tensor, Tensor]] = []
    for turn in range(math.ceil(len(images) / world_size)):
        index = turn * world_size + rank
        surplus = index >= len(images)  # fewer images than processes in the last turn: code one for company
        pixels = images.load(0 if surplus else index)
        measured, rounded = estimate(codec, pixels, multiple=multiple, lmbda=lmbda, device=device)
        progress()
        if surplus:
            continue
        height, width = pixels.shape[1:]
        values = [measured.loss, measured.bpp, measured.bpp_y, measured.bpp_z, measured.mse]
        psnr = peak_signal_to_noise(pixels, rounded)
        table[index] = torch.tensor([width, height, *(value.item() for value in values), psnr])
        if len(kept) < keep:
            kept.append((index, pixels, rounded))
    results = [
        ImageResult(name, int(width), int(height), *values)
        for name, (width, height, *values) in zip(images.names, reduce(table).tolist(), strict=True)
    ]
    return Evaluation(results, [Reconstruction(x, x_hat, results[i]) for i, x, x_hat in kept])


def estimate(
    codec: Forward, pixels: Tensor, *, multiple: int, lmbda: float, device: torch.device
) -> tuple[RateDistortion, Tensor]:
    """One forward pass over an image, uint8 (3, H, W): its loss, (1,) each, and what a decoder would show.

    The loss is that of the reconstruction as it is; the second tensor is clamped and rounded to uint8
    (3, H, W), on the CPU. The padding costs bits, but own pixels alone are counted.
    """
    height, width = pixels.shape[1:]
    x = pixels.to(device)[None].float() / 255
    coded = codec(pad(x, multiple).contiguous(memory_format=torch.channels_last))
    x_hat = coded.x_hat[..., :height, :width]
    loss = rate_distortion_loss(x, x_hat, coded.bits_y, coded.bits_z, lmbda)
    return loss, (x_hat[0].clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def pad(x: Tensor, multiple: int) -> Tensor:
    """Replicate the last row and column of (1, 3, H, W) until both sides are multiples of `multiple`."""
    height, width = x.shape[2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
