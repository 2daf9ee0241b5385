"""Decoding with different floating-point arithmetic, with the scale shifts of the file format and without.

    python benchmarks/portable_decoding.py --weights WEIGHTS --images FOLDER [--limit N]

Every image is encoded once with and once without shifts, and both files are decoded with the arithmetic of each of
VARIANTS. Printed: the number of files that cannot be decoded, the largest difference of scales (in ln(scale), and
relative to the tolerance), and the bits of the shifts as a share of all bits.
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hpcm_scale.coding.codec import Codec
from hpcm_scale.coding.container import unpack
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.entropy.range_coder import LOWEST
from hpcm_scale.entropy.shifts import Tolerance
from hpcm_scale.errors import UserError
from hpcm_scale.model.variable_rate import default_byte
from hpcm_scale.model.weights import load_weights
from hpcm_scale.tracking.progress import progress


def noise(model: nn.Module) -> None:
    """Relative noise of 1e-6 on the output of every layer."""
    generator = torch.Generator().manual_seed(0)

    def disturb(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * (1 + 1e-6 * torch.randn(output.shape, generator=generator).to(output))

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(disturb)


def channels_last(model: nn.Module) -> None:
    """The channels-last memory format."""
    model.to(memory_format=torch.channels_last)


def float64(model: nn.Module) -> None:
    """Double precision."""
    model.double()


def gpu(model: nn.Module) -> None:
    """A CUDA device."""
    model.cuda()


VARIANTS: dict[str, Callable[[nn.Module], None]] = {
    "noise of 1e-6": noise,
    "channels last": channels_last,
    "float64": float64,
}


def variant(codec: Codec, change: Callable[[nn.Module], None]) -> Codec:
    """A codec with the same weights and other arithmetic."""
    other = copy.deepcopy(codec)
    change(other.model)
    return other


@contextmanager
def other_threads():
    """Inside, torch uses one thread if it had several, else two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def decodes(codec: Codec, data: bytes) -> bool:
    """Whether the symbols of a file can be decoded."""
    try:
        codec.decode(unpack(data))
    except UserError as error:
        if error.code != "wrong-symbols":
            raise
        return False
    return True


@torch.inference_mode()
def scales(codec: Codec, data: bytes) -> Tensor:
    """All scales of a decoder of this file, fp32, on the CPU."""
    seen: list[Tensor] = []
    traverse = codec.model.context.traverse_packed

    def recording(hyper_parameters: Tensor, code, mix: Tensor | None = None):
        def note(step: int, scale: Tensor, mean: Tensor) -> Tensor:
            seen.append(scale.float().flatten().cpu())
            return code(step, scale, mean)

        return traverse(hyper_parameters, note, mix)

    codec.model.context.traverse_packed = recording
    try:
        codec.decode(unpack(data))
    finally:
        del codec.model.context.traverse_packed
    return torch.cat(seen)


def apart(found: Tensor, expected: Tensor, tolerance: Tolerance) -> tuple[float, float]:
    """The largest difference of two decoders' scales in ln(scale), and relative to the tolerance."""
    relevant = expected > 0.9 * LOWEST
    found, expected = found[relevant].double(), expected[relevant].double()
    distance = (found - expected).abs()
    reach = tolerance.relative * expected + tolerance.absolute
    return (found / expected).log().abs().max().item(), (distance / reach).max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()

    model, _ = load_weights(options.weights)
    level = default_byte(model.config.rate)
    codec, fragile = Codec(model), Codec(model, Tolerance(0, 0))
    variants = {name: variant(codec, change) for name, change in VARIANTS.items()}
    if torch.cuda.is_available():
        variants[torch.cuda.get_device_name()] = variant(codec, gpu)
    rows = {name: [0, 0, 0.0, 0.0] for name in [*variants, "other threads"]}
    images = ImageSet(options.images, options.limit)
    cost = total = 0.0

    def note(name: str, other: Codec) -> None:
        row = rows[name]
        row[0] += not decodes(other, encoded.data)
        row[1] += not decodes(other, without)
        if decodes(other, encoded.data):
            row[2:] = map(max, row[2:], apart(scales(other, encoded.data), expected, codec.tolerance))

    for i in progress(range(len(images)), description="decoding", unit="image"):
        pixels = images.load(i)
        encoded, without = codec.encode(pixels, level), fragile.compress(pixels, level)
        cost, total = cost + encoded.shift_bits, total + 8 * len(encoded.data)
        expected = scales(codec, encoded.data)
        for name, other in variants.items():
            note(name, other)
        with other_threads():
            note("other threads", codec)

    threads = f"{torch.get_num_threads()} CPU threads, {platform.machine()}"
    print(f"{model.config.name}, {len(images)} images, torch {torch.__version__}, {threads}")
    print(f"shifts: {100 * cost / total:.3f} % of {total / 8:,.0f} bytes")
    print("arithmetic      undecodable with shifts   without   scales apart in ln   of the tolerance")
    for name, (failed, failed_without, distance, share) in rows.items():
        print(f"{name:15s} {failed:23d} {failed_without:9d} {distance:20.1e} {share:18.2f}")


if __name__ == "__main__":
    main()
