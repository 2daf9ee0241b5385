"""Estimated rate and distortion from a forward pass, for one image or for a set distributed over the processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcm_scale.data.sources import ImageSet
from hpcm_scale.evaluation.measures import peak_signal_to_noise
from hpcm_scale.model.hpcm import Coded
from hpcm_scale.objective import Objective, RateDistortion

Result = TypeVar("Result")


class Together(Protocol):
    """Runs work that may fail in one process, so that it fails in all processes or in none."""

    def __call__(self, work: Callable[[], Result], *, forward: bool = False) -> Result:
        """The result of the work; `forward`: it is a forward pass, in which sharded weights are gathered."""
        ...


def by_itself(work: Callable[[], Result], *, forward: bool = False) -> Result:
    """`Together` for a single process."""
    return work()


Forward = Callable[..., Coded]
"""A forward pass of a model or of an engine's module, given images and, at variable rate, `level=…`."""


@dataclass(frozen=True)
class ImageResult:
    """One image; rates per image pixel, without padding."""

    name: str
    width: int
    height: int
    loss: float
    """Training loss; the reconstruction is neither clamped nor rounded, as for `mse`."""
    bpp: float
    bpp_y: float
    bpp_z: float
    mse: float
    psnr: float
    """dB; the reconstruction is clamped and rounded to 8 bits."""
    more: dict[str, float] = field(default_factory=dict)
    """Further fields of the objective."""

    def measures(self) -> dict[str, float]:
        """All measurements by name."""
        return {name: getattr(self, name) for name in RateDistortion._fields} | self.more


class Reconstruction(NamedTuple):
    """An image and its reconstruction, both uint8 (3, H, W)."""

    original: Tensor
    reconstruction: Tensor
    result: ImageResult


@dataclass(frozen=True)
class Evaluation:
    """The results of a set, in its order, and the reconstructions that this process keeps."""

    images: list[ImageResult]
    reconstructions: list[Reconstruction]

    def mean(self) -> dict[str, float]:
        """Means over the images; the PSNR is the mean of the images' PSNRs."""
        measures = [image.measures() for image in self.images]
        return {key: math.fsum(image[key] for image in measures) / len(measures) for key in measures[0]}


@torch.no_grad()
def evaluate(
    codec: Forward,
    images: ImageSet,
    *,
    multiple: int,
    objective: Objective,
    device: torch.device,
    level: float | None = None,
    rank: int = 0,
    world_size: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda values: values,
    together: Together = by_itself,
    keep: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Code every image once and measure it; called by every process, and returns all results to each.

    Process `rank` takes every `world_size`-th image; all processes call the codec equally often, as sharded weights
    require. Arguments that are not below are those of `estimate`.

    Args:
        reduce: sums a tensor over the processes.
        together: see `Together`.
        keep: most reconstructions to return, of this process's images.
        progress: called after each image.
    """
    table = torch.zeros(len(images), 2 + len(objective.fields), dtype=torch.float64)
    kept: list[tuple[int, Tensor, Tensor]] = []
    for block in range(math.ceil(len(images) / world_size)):
        index = block * world_size + rank
        surplus = index >= len(images)  # fewer images than processes are left: code the first one again
        pixels = together(partial(images.load, 0 if surplus else index))
        coded = partial(estimate, codec, pixels, multiple=multiple, objective=objective, device=device, level=level)
        measured, rounded = together(coded, forward=True)
        progress()
        if surplus:
            continue
        height, width = pixels.shape[1:]
        values = measured._asdict() | {"psnr": torch.tensor(peak_signal_to_noise(pixels, rounded))}
        table[index] = torch.tensor([width, height, *(value.item() for value in values.values())])
        if len(kept) < keep:
            kept.append((index, pixels, rounded))
    own = len(RateDistortion._fields)
    more = objective.fields[own:]
    results = [
        ImageResult(name, int(width), int(height), *values[:own], more=dict(zip(more, values[own:], strict=True)))
        for name, (width, height, *values) in zip(images.names, reduce(table).tolist(), strict=True)
    ]
    return Evaluation(results, [Reconstruction(x, x_hat, results[i]) for i, x, x_hat in kept])


def estimate(
    codec: Forward,
    pixels: Tensor,
    *,
    multiple: int,
    objective: Objective,
    device: torch.device,
    level: float | None = None,
) -> tuple[RateDistortion, Tensor]:
    """One forward pass over an image, uint8 (3, H, W): its loss, (1,) each, and its reconstruction.

    The loss is that of the unrounded reconstruction; the reconstruction returned is clamped and rounded to uint8
    (3, H, W), on the CPU. The image is padded by replication to multiples of `multiple`; padding costs bits but does
    not count as pixels. `device`: that of the codec. `level`: of a variable-rate model.
    """
    height, width = pixels.shape[1:]
    x = pixels.to(device)[None].float() / 255
    levels = None if level is None else torch.full((1,), level, device=device)
    padded = pad(x, multiple).contiguous(memory_format=torch.channels_last)
    coded = codec(padded) if levels is None else codec(padded, level=levels)
    coded = coded._replace(x_hat=coded.x_hat[..., :height, :width])
    loss = objective(x, coded, levels)
    return loss, (coded.x_hat[0].clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def pad(x: Tensor, multiple: int) -> Tensor:
    """Replicate the last row and column of (1, 3, H, W) until both sides are multiples of `multiple`."""
    height, width = x.shape[2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
