"""Three ways to code one image: a model's real file, a model's estimate, another codec's real file."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from hpcm_scale.coding.codec import Codec
from hpcm_scale.config.schema import Distortion
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.evaluation.baselines import OtherCodec
from hpcm_scale.evaluation.bd_rate import METRICS
from hpcm_scale.evaluation.estimate import estimate
from hpcm_scale.evaluation.measures import Estimated, Measured, measure
from hpcm_scale.machine.codec import MachineCodec, edit_of
from hpcm_scale.model.variable_rate import level_of_byte
from hpcm_scale.objective import objective_of, too_small

WARM_UP_SIDE = 256
"""Pixels: the first file a model makes also pays for its tables and kernels, so a small one goes before it."""


class CodedImage(NamedTuple):
    """What became of one image."""

    decoded: Tensor
    """uint8 (3, H, W), on the CPU."""
    bits: float
    """8 × the bytes of the file; or the estimate."""
    encode_seconds: float | None
    """From pixels in memory to bytes in memory; None for an estimate."""
    decode_seconds: float | None
    training: dict[str, float | None] | None = None
    """Of an estimate: the fields that `Estimated` adds."""


Coder = Callable[[Tensor], CodedImage]
"""Takes pixels, uint8 (3, H, W), on the CPU."""
Watcher = Callable[[int, Tensor, Tensor, Measured], None]
"""Sees the index of every image, its pixels, what was decoded, and what was measured."""


def file_coder(model: MachineCodec, device: torch.device, level: int | None = None) -> Coder:
    """Compress to a real file (in memory), and decompress from its bytes alone; fp32.

    `level`: the byte of a variable-rate model's files, 0 to 255.
    """
    codec = Codec(model.to(device).codec, edit=edit_of(model))
    warm = False

    def code(pixels: Tensor) -> CodedImage:
        nonlocal warm
        if not warm:
            codec.decompress(codec.compress(pixels[:, :WARM_UP_SIDE, :WARM_UP_SIDE], level))
            warm = True
        start = time.perf_counter()
        data = codec.compress(pixels, level)
        encoded = time.perf_counter()
        decoded = codec.decompress(data).cpu()
        return CodedImage(decoded, 8.0 * len(data), encoded - start, time.perf_counter() - encoded)

    return code


def estimate_coder(
    model: MachineCodec,
    device: torch.device,
    lmbda: float | None,
    level: int | None = None,
    distortion: Distortion = Distortion.mse,
) -> Coder:
    """One forward pass in the model's precision: the bits its likelihoods promise, no file.

    `level`: the byte that a variable-rate model's files would have. The loss is that at `lmbda` of a `distortion`; None
    without a λ, or where MS-SSIM is not defined.
    """
    model.to(device)
    number = None if level is None else level_of_byte(model.config.rate, level)

    def code(pixels: Tensor) -> CodedImage:
        known = lmbda is not None and not (distortion == Distortion.ms_ssim and too_small(pixels))
        objective = objective_of(distortion, lmbda) if known else objective_of(Distortion.mse, 0.0)
        result, decoded = estimate(
            model, pixels, multiple=model.multiple, objective=objective, device=device, level=number
        )
        training = {name: getattr(result, name).item() for name in ("loss", "bpp_y", "bpp_z", "mse")}
        if not known:
            training["loss"] = None
        return CodedImage(decoded, result.bpp.item() * pixels[0].numel(), None, None, training)

    return code


def other_coder(codec: OtherCodec, setting: object) -> Coder:
    """A real file of another codec at one of its settings."""

    def code(pixels: Tensor) -> CodedImage:
        coded = codec.code(pixels, setting)
        return CodedImage(coded.decoded, 8.0 * coded.size_bytes, coded.encode_seconds, coded.decode_seconds)

    return code


@torch.no_grad()
def code_images(
    coder: Coder,
    images: ImageSet,
    *,
    watch: Watcher | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda turns: turns,
    metrics: Collection[str] = tuple(METRICS),
) -> list[Measured]:
    """Code every image of a set, one after the other, and measure it by `metrics`; in the set's order."""
    results = []
    for index in progress(range(len(images))):
        pixels = images.load(index)
        coded = coder(pixels)
        seconds = coded.encode_seconds, coded.decode_seconds
        measured = measure(images.names[index], pixels, coded.decoded, coded.bits, *seconds, metrics)
        if coded.training:
            measured = Estimated(**asdict(measured), **coded.training)
        if watch:
            watch(index, pixels, coded.decoded, measured)
        results.append(measured)
    return results
