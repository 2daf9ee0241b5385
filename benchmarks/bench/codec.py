"""`hpcm bench codec`: time to encode and decode images, and the entropy coder's share of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor

from bench.machine import machine
from bench.report import Report, Table, with_quartiles
from bench.timing import Stopwatch, alternate, ratio, seconds
from hpcm_scale.coding import codec as coding
from hpcm_scale.coding.codec import Codec
from hpcm_scale.errors import UserError
from hpcm_scale.model.arithmetic import Kernels, use_kernels
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.variable_rate import default_byte

ENTROPY_CODING = (
    (coding, "choose_shifts"),
    (coding, "shifted_tables"),
    (coding, "write_head"),
    (coding, "write_step"),
    (coding.SymbolWriter, "write"),
    (coding.SymbolReader, "read"),
    (coding.ShiftReader, "tables"),
)
"""All entropy coding outside the networks: choosing shifts, looking up tables, range coding."""
DIRECTIONS = ("encode", "decode")
REFERENCE, FAST = "plain NCHW", "optimized"


@dataclass(frozen=True)
class ImageSpeed:
    """One image, coded several times by both variants, fp32."""

    image: str
    width: int
    height: int
    bytes: int
    """Size of its file."""
    same_bytes: bool
    """Whether both variants write the same file."""
    seconds: dict[str, dict[str, list[float]]]
    """By direction (`DIRECTIONS`) and variant (`REFERENCE`, `FAST`), of each round."""
    entropy_seconds: dict[str, list[float]]
    """By direction: time of the optimized variant in the entropy coder."""


def synthetic_image(height: int = 512, width: int = 768) -> Tensor:
    """A synthetic image of coloured noise, always the same: uint8 (3, height, width).

    Its amplitudes fall with frequency as those of natural images.
    """
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    falling = 1 / torch.hypot(rows, columns).clamp(min=1 / max(height, width))
    noise = torch.fft.irfft2(torch.fft.rfft2(torch.randn(3, height, width, generator=generator)) * falling)
    noise = noise - noise.mean(dim=(1, 2), keepdim=True)
    return (127.5 + 50 * noise / noise.std()).round().clamp(0, 255).to(torch.uint8)


@contextmanager
def computed(variant: str, model: HPCM) -> Iterator[None]:
    """Inside, the networks compute by that variant (`REFERENCE`, `FAST`), for inputs of any memory format."""
    with ExitStack() as stack:
        if variant == REFERENCE:
            stack.enter_context(use_kernels(Kernels.reference))
            for network in (model.g_a, model.h_a, model.h_s, model.g_s):
                hook = network.register_forward_pre_hook(lambda _, inputs: tuple(x.contiguous() for x in inputs))
                stack.callback(hook.remove)
        yield


def measure_codec(
    model: HPCM, images: Sequence[tuple[str, Callable[[], Tensor]]], rounds: int, device: torch.device
) -> list[ImageSpeed]:
    """Encode and decode every image by both variants, alternating.

    `images`: names, and functions that load the pixels, uint8 (3, H, W). Raises UserError if a decoded image differs
    from the encoder's reconstruction.
    """
    codec, watch = Codec(model.to(device)), Stopwatch(device)
    with watch.on(ENTROPY_CODING):
        return [_measure_image(codec, watch, name, load(), rounds, device) for name, load in images]


def _measure_image(
    codec: Codec, watch: Stopwatch, name: str, pixels: Tensor, rounds: int, device: torch.device
) -> ImageSpeed:
    files, level = {}, default_byte(codec.model.config.rate)
    for variant in (REFERENCE, FAST):
        with computed(variant, codec.model):
            files[variant] = _checked(codec, name, pixels)

    def candidate(direction: str, variant: str) -> Callable[[], float]:
        def run() -> float:
            watch.take()
            with computed(variant, codec.model):
                codec.compress(pixels, level) if direction == "encode" else codec.decompress(files[variant])
            return watch.take()

        return run

    keys = {(direction, variant): f"{direction} {variant}" for direction in DIRECTIONS for variant in (REFERENCE, FAST)}
    candidates = {key: candidate(*which) for which, key in keys.items()}
    samples = alternate(candidates, rounds, device, description=name, warm_up=0)
    return ImageSpeed(
        image=name,
        width=pixels.shape[2],
        height=pixels.shape[1],
        bytes=len(files[FAST]),
        same_bytes=files[REFERENCE] == files[FAST],
        seconds={
            direction: {variant: seconds(samples[keys[direction, variant]]) for variant in (REFERENCE, FAST)}
            for direction in DIRECTIONS
        },
        entropy_seconds={
            direction: [sample.result for sample in samples[keys[direction, FAST]]] for direction in DIRECTIONS
        },
    )


def _checked(codec: Codec, name: str, pixels: Tensor) -> bytes:
    """The file of an image, checked against the encoder's reconstruction; also a warm-up."""
    encoded = codec.encode(pixels, default_byte(codec.model.config.rate))
    expected = codec.reconstruct(encoded.y_hat, *pixels.shape[1:])
    if not torch.equal(codec.decompress(encoded.data), expected):
        raise UserError(
            "reconstruction-differs",
            "",
            f"the decoded {name} differs from the encoder's reconstruction; this is a bug of the codec, report it",
        )
    return encoded.data


def codec_report(model: HPCM, images: list[ImageSpeed], source: str, device: torch.device) -> Report:
    """Table and numbers of `hpcm bench codec`; `source` describes images and weights."""
    pixels = sum(image.width * image.height for image in images)
    same = sum(image.same_bytes for image in images)
    bits = 8 * sum(image.bytes for image in images) / pixels
    rounds = len(images[0].seconds["encode"][FAST])
    counted = f"{len(images)} image{'s' * (len(images) > 1)} × {rounds} round{'s' * (rounds > 1)}"
    table = Table(
        title="",
        headings=["", f"{REFERENCE} (s)", f"{FAST} (s)", "times as fast", "entropy coding (s)", "share of the time"],
        rows=[_row(direction, images) for direction in DIRECTIONS],
        notes=[
            f"{source[0].upper()}{source[1:]}; {bits:.3f} bits per pixel. fp32, from pixels in memory to bytes in "
            f"memory and back; medians over {counted}, alternating; in brackets the quartiles of the ratios.",
            "Every decoded image equals the encoder's reconstruction to the bit. "
            f"Both variants wrote the same bytes for {same} of {len(images)}"
            + (": floats that differ in the last digits are rounded to other symbols." if same < len(images) else "."),
            "Entropy coding: everything outside the networks (choosing shifts, looking up tables, range coding).",
        ],
    )
    name = model.config.name
    results = {"model": name, "source": source, "rounds": rounds, "images": [asdict(image) for image in images]}
    return Report("codec", f"Encoding and decoding with {name}", machine(device), [table], results)


def _row(direction: str, images: list[ImageSpeed]) -> list[str]:
    plain_seconds, fast_seconds = (
        [second for image in images for second in image.seconds[direction][variant]] for variant in (REFERENCE, FAST)
    )
    entropy = [second for image in images for second in image.entropy_seconds[direction]]
    return [
        direction,
        f"{median(plain_seconds):.3f}",
        f"{median(fast_seconds):.3f}",
        with_quartiles(ratio(plain_seconds, fast_seconds), 2, "×"),
        f"{median(entropy):.3f}",
        with_quartiles(ratio(entropy, fast_seconds), 1, " %", 100),
    ]
