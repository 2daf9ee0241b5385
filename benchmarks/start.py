"""The loss of untrained models, by initialization: `model.start=random` and `klt`.

    python benchmarks/start.py --images ../shared/data/kodak [--lmbda 0.013] [--models nano small] [--out FOLDER]

By default every preset up to 68m, and the size of each family's preset.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bench.machine import machine
from bench.report import Report, Table, publish

from hpcm_scale.config.choices import Start
from hpcm_scale.config.compose import compose_model, preset_names
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import entry_point
from hpcm_scale.evaluation.estimate import evaluate
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.ladder import sized
from hpcm_scale.model.parameters import on_meta, parameter_count
from hpcm_scale.model.start import karhunen_loeve_start
from hpcm_scale.objective import RateDistortionObjective
from hpcm_scale.tracking.progress import progress

LARGEST = 70_000_000
HEADINGS = ["model", "parameters", "start", "loss", "bpp", "of that z", "PSNR, dB"]


@entry_point
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", required=True)
    parser.add_argument("--limit", type=int, help="number of images; default: all")
    parser.add_argument("--lmbda", type=float, default=0.013)
    parser.add_argument("--models", nargs="+", default=preset_names("model"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cpu = torch.device("cpu")
    images, objective = ImageSet(arguments.images, arguments.limit), RateDistortionObjective(arguments.lmbda)
    configs = [sized(compose_model(name)) for name in arguments.models]
    sizes = {config.name: parameter_count(on_meta(config)) for config in configs}
    chosen = sorted((each for each in configs if sizes[each.name] <= LARGEST), key=lambda each: sizes[each.name])
    pairs = [(config, start) for config in chosen for start in Start]
    rows, results = [], []
    for config, start in progress(pairs, description="models"):
        torch.manual_seed(0)
        model = HPCM(config).eval()
        if start == Start.klt:
            karhunen_loeve_start(model, arguments.lmbda)
        mean = evaluate(model, images, multiple=model.multiple, objective=objective, device=cpu).mean()
        results.append({"model": config.name, "parameters": sizes[config.name], "start": start.value, **mean})
        numbers = [f"{mean[key]:.{digits}f}" for key, digits in (("loss", 3), ("bpp", 3), ("bpp_z", 3), ("psnr", 2))]
        rows.append([config.name, f"{sizes[config.name]:,}", start.value, *numbers])
    title = f"Untrained models at λ = {arguments.lmbda:g}, {len(images)} images"
    tables = [Table("", HEADINGS, rows, ["Means over the images, seed 0, fp32."])]
    measured_on = machine(cpu, ("python", "benchmarks/start.py"))
    publish(Report("start", title, measured_on, tables, {"rows": results}), arguments.out)


if __name__ == "__main__":
    main()
