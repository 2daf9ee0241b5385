"""Share of entropy coding in the time of encoding and decoding an image.

    python benchmarks/entropy_coding_share.py --images FOLDER [--weights WEIGHTS] [--model 68m] [--limit N]

Entropy coding is all that is done outside the networks: choosing shifts, finding tables, range coding. Without
weights the model is as it is before training, which leaves more to code than training does.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest.mock import patch

import torch

from hpcm_scale.coding import codec as module
from hpcm_scale.config.compose import compose_model
from hpcm_scale.data.image_set import ImageSet
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.weights import load_weights


def timed(function: Callable, spent: list[float]) -> Callable:
    def wrapped(*arguments, **keywords):
        start = time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            spent[0] += time.perf_counter() - start

    return wrapped


def measure(work: Callable, argument, spent: list[float]):
    """What the work gives, its seconds, and those of entropy coding among them."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    spent[0], start = 0.0, time.perf_counter()
    result = work(argument)
    return result, time.perf_counter() - start, spent[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--weights")
    parser.add_argument("--model", default="68m")
    parser.add_argument("--limit", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = load_weights(options.weights)[0] if options.weights else HPCM(compose_model(options.model)).eval()
    codec = module.Codec(model.to(options.device))
    images = ImageSet(options.images, options.limit)
    spent = [0.0]
    rows = []
    with ExitStack() as patches:
        for owner, name in (
            (module, "choose_shifts"),
            (module, "shifted_tables"),
            (module, "write_step"),
            (module.SymbolWriter, "write"),
            (module.SymbolReader, "read"),
            (module.ShiftReader, "tables"),
        ):
            patches.enter_context(patch.object(owner, name, timed(getattr(owner, name), spent)))
        codec.decompress(codec.compress(images.load(0)))  # makes tables and warms up
        for i in range(len(images)):
            pixels = images.load(i)
            data, encoding, encoding_share = measure(codec.compress, pixels, spent)
            _, decoding, decoding_share = measure(codec.decompress, data, spent)
            rows.append((encoding, encoding_share, decoding, decoding_share, 8 * len(data) / pixels[0].numel()))

    columns = [statistics.median(column) for column in zip(*rows, strict=True)]
    threads = f"{torch.get_num_threads()} CPU threads, {platform.machine()}, {options.device}"
    print(f"{model.config.name}, {len(rows)} images, torch {torch.__version__}, {threads}; medians")
    for name, seconds, coding in (("encode", *columns[0:2]), ("decode", *columns[2:4])):
        print(f"{name}: {seconds:.2f} s, entropy coding {coding:.3f} s: {100 * coding / seconds:.1f} %")
    print(f"{columns[4]:.3f} bits per pixel")


if __name__ == "__main__":
    main()
