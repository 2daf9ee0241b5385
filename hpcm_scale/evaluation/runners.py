"""Runners code one image: a model to a real file, or a model's estimate; `Baseline.code` is one as well."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hpcm_scale.coding.codec import Codec
from hpcm_scale.config.schema import Distortion
from hpcm_scale.evaluation.bd_rate import METRICS
from hpcm_scale.evaluation.estimate import estimate
from hpcm_scale.evaluation.measures import Estimated, Measured, measure
from hpcm_scale.model.variable_rate import level_of_byte
from hpcm_scale.objective import RateDistortionObjective, too_small
from hpcm_scale.tasks import Encoder
from hpcm_scale.tracking.progress import progress

WARM_UP_SIDE = 256
"""Side in pixels of the crop that is coded first, untimed: the first call also builds tables and kernels."""


class Images(Protocol):
    """A set of images, such as `ImageSet`."""

    names: list[str]

    def __len__(self) -> int: ...

    def load(self, i: int) -> Tensor:
        """Image `i` as RGB, uint8 (3, H, W)."""
        ...


class CodedImage(NamedTuple):
    """The result of one image."""

    decoded: Tensor
    """uint8 (3, H, W), on the CPU."""
    bits: float
    """8 × the bytes of the file (of VVC, which has no file format, of the bitstream); or the estimate."""
    encode_seconds: float | None
    """From pixels in memory to bytes in memory, of other programs including their start; None for an estimate."""
    decode_seconds: float | None
    training: dict[str, Any] | None = None
    """The fields that `Estimated` adds; None for a file."""


Runner = Callable[[Tensor], CodedImage]
"""Codes and decodes an image, uint8 (3, H, W), on the CPU."""
Watcher = Callable[[str, int, Tensor, Tensor, Measured], None]
"""Called with the name of codec and setting, the index of the image, its pixels, the decoded ones, measurements."""


def file_runner(encoder: Encoder, device: torch.device, level: int | None = None) -> Runner:
    """Compress to a real file in memory and decompress from its bytes, in fp32.

    `level`: level byte of a variable-rate model's files, 0 to 255.
    """
    encoder.module.to(device)
    codec = Codec(encoder.codec, edit=encoder.edit)
    warm = False

    def run(pixels: Tensor) -> CodedImage:
        nonlocal warm
        if not warm:
            codec.decompress(codec.compress(pixels[:, :WARM_UP_SIDE, :WARM_UP_SIDE], level))
            warm = True
        start = time.perf_counter()
        data = codec.compress(pixels, level)
        encoded = time.perf_counter()
        decoded = codec.decompress(data).cpu()
        return CodedImage(decoded, 8.0 * len(data), encoded - start, time.perf_counter() - encoded)

    return run


def estimate_runner(
    encoder: Encoder,
    device: torch.device,
    lmbda: float | None,
    level: int | None = None,
    distortion: Distortion = Distortion.mse,
) -> Runner:
    """One forward pass in the model's precision; bits are estimated from the likelihoods, no file is written.

    `level`: level byte that a variable-rate model's files would have. The loss uses `lmbda` and `distortion`; it is
    None without a λ, and if the image is too small for MS-SSIM.
    """
    model = encoder.module.to(device)
    number = None if level is None else level_of_byte(encoder.codec.config.rate, level)

    def run(pixels: Tensor) -> CodedImage:
        known = None if distortion == Distortion.ms_ssim and too_small(pixels) else lmbda
        objective = RateDistortionObjective(0.0) if known is None else RateDistortionObjective(known, distortion)
        result, decoded = estimate(
            model, pixels, multiple=encoder.codec.multiple, objective=objective, device=device, level=number
        )
        training = {name: getattr(result, name).item() for name in ("loss", "bpp_y", "bpp_z", "mse")}
        if known is None:
            training["loss"] = None
        return CodedImage(decoded, result.bpp.item() * pixels[0].numel(), None, None, training)

    return run


@torch.no_grad()
def code_images(
    name: str,
    runner: Runner,
    images: Images,
    *,
    watch: Watcher | None = None,
    metrics: Collection[str] = tuple(METRICS),
) -> list[Measured]:
    """Code the images of a set one by one and measure each by `metrics`; in the set's order.

    `name`: that of codec and setting, for the progress bar and `watch`.
    """
    results = []
    for index in progress(range(len(images)), description=name, unit="image", report=True):
        pixels = images.load(index)
        coded = runner(pixels)
        seconds = coded.encode_seconds, coded.decode_seconds
        measured = measure(images.names[index], pixels, coded.decoded, coded.bits, *seconds, metrics)
        if coded.training:
            measured = Estimated(**asdict(measured), **coded.training)
        if watch:
            watch(name, index, pixels, coded.decoded, measured)
        results.append(measured)
    return results
