"""`hpcm bench codec`: how fast images become files and pictures again, and how much of that is the entropy coder's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.machine import machine
from bench.plain import plain
from bench.report import Report, Table, with_quartiles
from bench.timing import Stopwatch
from hpcm_scale.coding import codec as coding
from hpcm_scale.coding.codec import Codec
from hpcm_scale.errors import UserError
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.variable_rate import usual_byte
from hpcm_scale.tracking.timing import Turn, alternate, ratio, seconds, spread

ENTROPY_CODING = (
    (coding, "choose_shifts"),
    (coding, "shifted_tables"),
    (coding, "write_head"),
    (coding, "write_step"),
    (coding.SymbolWriter, "write"),
    (coding.SymbolReader, "read"),
    (coding.ShiftReader, "tables"),
)
"""All that is done to the symbols outside the networks: choosing shifts, finding tables, range coding."""
DIRECTIONS = ("encode", "decode")
PLAIN, FAST = "plain NCHW", "as it is"


@dataclass(frozen=True)
class ImageSpeed:
    """One image, coded several times in both ways; fp32."""

    image: str
    width: int
    height: int
    bytes: int
    """Of its file."""
    same_bytes: bool
    """Whether both ways write the same file."""
    seconds: dict[str, dict[str, list[float]]]
    """By direction (`DIRECTIONS`) and way (`PLAIN`, `FAST`), of each round."""
    entropy_seconds: dict[str, list[float]]
    """By direction: what of the time as it is went to the entropy coder."""


def picture(height: int = 512, width: int = 768) -> Tensor:
    """A made picture of soft coloured noise, always the same: uint8 (3, height, width).

    Its amplitudes fall with frequency as those of photos do.
    """
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    falling = 1 / torch.hypot(rows, columns).clamp(min=1 / max(height, width))
    noise = torch.fft.irfft2(torch.fft.rfft2(torch.randn(3, height, width, generator=generator)) * falling)
    noise = noise - noise.mean(dim=(1, 2), keepdim=True)
    return (127.5 + 50 * noise / noise.std()).round().clamp(0, 255).to(torch.uint8)


@contextmanager
def computed(way: str, model: HPCM) -> Iterator[None]:
    """Have the networks compute in that way (`PLAIN`, `FAST`), whatever memory format the codec hands them."""
    with ExitStack() as stack:
        if way == PLAIN:
            stack.enter_context(plain())
            for network in (model.g_a, model.h_a, model.h_s, model.g_s):
                hook = network.register_forward_pre_hook(lambda _, inputs: tuple(x.contiguous() for x in inputs))
                stack.callback(hook.remove)
        yield


def measure_codec(
    model: HPCM, images: Sequence[tuple[str, Callable[[], Tensor]]], rounds: int, device: torch.device
) -> list[ImageSpeed]:
    """Encode and decode every image in both ways, in turns.

    `images`: names, and what loads the pixels, uint8 (3, H, W). Raises UserError if a picture does not come out of
    its file as the encoder had it.
    """
    codec, watch = Codec(model.to(device)), Stopwatch(device)
    with watch.on(ENTROPY_CODING):
        return [_measure_image(codec, watch, name, load(), rounds, device) for name, load in images]


def _measure_image(
    codec: Codec, watch: Stopwatch, name: str, pixels: Tensor, rounds: int, device: torch.device
) -> ImageSpeed:
    files, level = {}, usual_byte(codec.model.config.rate)
    for way in (PLAIN, FAST):
        with computed(way, codec.model):
            files[way] = _checked(codec, name, pixels)

    def contestant(direction: str, way: str) -> Callable[[], float]:
        def run() -> float:
            watch.take()
            with computed(way, codec.model):
                codec.compress(pixels, level) if direction == "encode" else codec.decompress(files[way])
            return watch.take()

        return run

    keys = {f"{direction} {way}": (direction, way) for direction in DIRECTIONS for way in (PLAIN, FAST)}
    contestants = {key: contestant(*which) for key, which in keys.items()}
    turns = alternate(contestants, rounds, device, description=name, warm_up=0)
    by_way: dict[str, dict[str, list[Turn]]] = {direction: {} for direction in DIRECTIONS}
    for key, (direction, way) in keys.items():
        by_way[direction][way] = turns[key]
    return ImageSpeed(
        image=name,
        width=pixels.shape[2],
        height=pixels.shape[1],
        bytes=len(files[FAST]),
        same_bytes=files[PLAIN] == files[FAST],
        seconds={direction: {way: seconds(ran) for way, ran in ways.items()} for direction, ways in by_way.items()},
        entropy_seconds={direction: [turn.result for turn in ways[FAST]] for direction, ways in by_way.items()},
    )


def _checked(codec: Codec, name: str, pixels: Tensor) -> bytes:
    """The file of an image, after its picture has been seen to come out of it; also warms up."""
    encoded = codec.encode(pixels, usual_byte(codec.model.config.rate))
    expected = codec.picture(encoded.y_hat, *pixels.shape[1:])
    if not torch.equal(codec.decompress(encoded.data), expected):
        raise UserError(f"{name} does not come out of its file as the encoder had it; that is a fault of the codec")
    return encoded.data


def codec_report(model: HPCM, images: list[ImageSpeed], source: str, device: torch.device) -> Report:
    """Table and numbers of `hpcm bench codec`; `source` says where images and weights are from."""
    pixels = sum(image.width * image.height for image in images)
    same = sum(image.same_bytes for image in images)
    bits = 8 * sum(image.bytes for image in images) / pixels
    rounds = len(images[0].seconds["encode"][FAST])
    counted = f"{len(images)} image{'s' * (len(images) > 1)} × {rounds} round{'s' * (rounds > 1)}"
    table = Table(
        title="",
        headings=["", f"{PLAIN} (s)", f"{FAST} (s)", "times as fast", "entropy coding (s)", "of the time"],
        rows=[_row(direction, images) for direction in DIRECTIONS],
        notes=[
            f"{source[0].upper()}{source[1:]}; {bits:.3f} bits per pixel. fp32, from pixels in memory to bytes in "
            f"memory and back; medians over {counted} in turns, and in brackets the quartiles of the ratios.",
            "Every picture came out of its file, to the bit, as its encoder had it. "
            f"Both ways wrote the same bytes for {same} of {len(images)}"
            + (": floats that differ in the last digits round to other symbols." if same < len(images) else "."),
            "Entropy coding: everything outside the networks, that is choosing shifts, finding tables, range coding.",
        ],
    )
    name = model.config.name
    results = {"model": name, "source": source, "rounds": rounds, "images": [asdict(image) for image in images]}
    return Report("codec", f"Encoding and decoding with {name}", machine(device), [table], results)


def _row(direction: str, images: list[ImageSpeed]) -> list[str]:
    plain_seconds, fast_seconds = (
        [second for image in images for second in image.seconds[direction][way]] for way in (PLAIN, FAST)
    )
    entropy = [second for image in images for second in image.entropy_seconds[direction]]
    return [
        direction,
        f"{spread(plain_seconds).median:.3f}",
        f"{spread(fast_seconds).median:.3f}",
        with_quartiles(ratio(plain_seconds, fast_seconds), 2, "×"),
        f"{spread(entropy).median:.3f}",
        with_quartiles(ratio(entropy, fast_seconds), 1, " %", 100),
    ]
