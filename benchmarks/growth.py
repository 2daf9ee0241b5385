"""Time, utilisation and activations of a training step for several model sizes, crops and batches.

python benchmarks/growth.py [--rounds 3] [--out FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import torch
from bench.machine import machine
from bench.report import Report, Table, publish, with_quartiles
from bench.step import Steps, Variant
from bench.train import measure_steps

from hpcm_scale.config.compose import compose
from hpcm_scale.config.schema import Precision

CASES = (
    ("nano", 256, 2),
    ("mini", 256, 2),
    ("small", 256, 2),
    ("68m", 256, 1),
    ("68m", 256, 2),
    ("68m", 256, 4),
    ("68m", 512, 1),
)
"""Size, crop, batch."""
BF16 = Variant(Precision.bf16)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows, numbers = [], []
    for preset, crop, batch in CASES:
        config = compose([f"model={preset}", f"data.crop={crop}"])
        speed = measure_steps(config, batch, [BF16], arguments.rounds, Steps(config, batch, device))
        [measured] = speed.candidates
        rows.append(
            [
                preset,
                f"{crop}²",
                str(batch),
                f"{speed.flops / 1e12:.3f}",
                f"{median(measured.seconds):.3f}",
                with_quartiles(speed.utilisation(measured), 0, " %", 100),
                with_quartiles(speed.faster(measured), 2, "×"),
                f"{measured.activations / batch / 1e9:.3f}",
            ]
        )
        numbers.append({"model": preset, "crop": crop, "batch": batch, "seconds": measured.seconds})
    report = Report(
        name="growth",
        title="Training steps of several sizes, crops and batches, bf16, channels-last, eager",
        machine=machine(device, ("python", "benchmarks/growth.py")),
        tables=[
            Table(
                title="",
                headings=["model", "crop", "batch", "TFLOP", "seconds", "utilisation", "times as fast", "GB per crop"],
                rows=rows,
                notes=[
                    "Gradient clipping and Adam included. Utilisation, and speed relative to the fp32 reference, as in "
                    "`hpcm bench train`."
                ],
            )
        ],
        results={"cases": numbers},
    )
    publish(report, arguments.out)


if __name__ == "__main__":
    main()
