"""Run folders of the five sizes of arXiv 2508.09075, as far as its numbers and those of arXiv 2507.19125 tell.

    python benchmarks/paper_sizes.py --out docs/results/paper/journals

Published on Kodak: the points of HPCM-Base (68m), and the BD-rates of 68m and 1b against VTM-22.0. The loss of 1b at
λ = 0.013 follows from them, if the change of rate is the same at every rate. No numbers are published of 120m, 246m
and 544m: theirs are synthetic, on the power law through 68m and 1b. So the five points say nothing about the form of
the law, and its intervals are meaningless.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from omegaconf import OmegaConf

from hpcm_scale.config.compose import to_dict
from hpcm_scale.errors import entry_point
from hpcm_scale.evaluation.points import shipped, stated
from hpcm_scale.files import write_text
from hpcm_scale.model.ladder import compose_sized
from hpcm_scale.model.parameters import on_meta, parameter_count
from hpcm_scale.training.costs import training_flops_per_image

SIZES = ("68m", "120m", "246m", "544m", "1b")
LMBDA, POINT = 0.013, 3
"""λ, and its point on the published curve of six."""


@entry_point
def main() -> None:
    """Write the folders."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    base = shipped()["kodak/hpcm-base"]
    assert base.psnr is not None
    bpp, mse = base.bpp[POINT], 10 ** (-base.psnr[POINT] / 10)
    loss = bpp + LMBDA * 255**2 * mse
    rates = {each.codec: 1 + each.bd_rate["kodak"] / 100 for each in stated()}
    configs = {size: compose_sized(["experiment=hpcm_1b", f"model={size}", "model.start=random"]) for size in SIZES}
    models = {size: on_meta(config.model) for size, config in configs.items()}
    parameters = {size: parameter_count(model) for size, model in models.items()}
    per_log = math.log(rates["HPCM-1B"] / rates["HPCM-Base"]) / math.log(parameters["1b"] / parameters["68m"])
    for size, config in configs.items():
        ratio = (parameters[size] / parameters["68m"]) ** (per_log * bpp / loss)
        images = config.train.steps * config.train.batch_size
        config.data.shards, config.eval.images = "flickr2w", "kodak"
        config.run.dir, config.run.sweep = f"journals/{size}", "paper"
        training = {
            "step": config.train.steps,
            "time": 0.0,
            "train/images": images,
            "compute/pflops": images * training_flops_per_image(models[size], config.data.crop) / 1e15,
            "data/images": 20_745,
        }
        psnr = -10 * math.log10(mse * ratio)
        metrics = {"eval/loss": loss * ratio, "eval/bpp": bpp * ratio, "eval/psnr": psnr}
        rate = {"train/learning_rate": config.schedule.learning_rate * config.schedule.factors[-1]}
        lines = (training | rate, training | metrics)
        write_text(out / size / "metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
        write_text(out / size / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))


if __name__ == "__main__":
    main()
