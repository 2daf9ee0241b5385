"""Pauses of training for checkpoints that are written in the background and in the foreground.

    python benchmarks/checkpoint_stall.py [--model small] [--rounds 7]

One process trains on random crops and saves a checkpoint every few steps, alternately in the background and in the
foreground. Printed: the pause for either kind, the time to copy the same values, and the time of steps while a
checkpoint is written, relative to others.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from hpcm_scale.compute.tracker import peak_memory
from hpcm_scale.config.compose import compose
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.objective import rate_distortion_loss
from hpcm_scale.tracking.progress import progress
from hpcm_scale.training.checkpoints import Checkpoints, Saver
from hpcm_scale.training.engines import create_engine
from hpcm_scale.training.task import image_noise

STEPS_PER_ROUND = 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="small")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    config = compose(
        [f"model={arguments.model}", "engine=accelerate", "train.batch_size=2", "train.keep_checkpoints=1"]
    )
    engine = create_engine(config.engine, config.train, config.optimizer, RunSpec.of(config, 1))
    model = HPCM(config.model)
    engine.prepare(model)

    def step() -> float:
        began = time.perf_counter()
        images = torch.rand(2, 3, config.data.crop, config.data.crop, device=engine.device)
        coded = engine.module(images, image_noise(model, images, torch.arange(2), seed=0))
        loss = rate_distortion_loss(images, coded.x_hat, coded.bits_y, coded.bits_z, 0.013).mean().loss
        engine.backward(loss)
        engine.step(1e-5, float(engine.clip()))
        loss.item()
        return time.perf_counter() - began

    step()
    stalls: dict[str, list[float]] = {"background": [], "foreground": [], "copy only": []}
    quiet, disturbed = [], []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        saver = Saver(engine, Checkpoints(folder), config.train, before=lambda: None)
        number = 0
        for round_number in progress(range(arguments.rounds + 1), description="rounds", unit="round"):
            for kind in ("background", "foreground"):
                number += 1
                began = time.perf_counter()
                saver.begin({"step": number})
                if kind == "foreground":
                    saver.finish()
                stall = time.perf_counter() - began
                steps = [step() for _ in range(STEPS_PER_ROUND)]
                ended = saver.finish()
                assert not ended, ended
                if round_number:  # the first round allocates the buffers
                    stalls[kind].append(stall)
                    (disturbed if kind == "background" else quiet).extend(steps)
            state = engine.state_shards()
            copies = [torch.empty_like(shard.values, device="cpu") for shard in state]
            for copy in copies:
                copy.zero_()
            began = time.perf_counter()
            for copy, shard in zip(copies, state, strict=True):
                copy.copy_(shard.values)
            if round_number:
                stalls["copy only"].append(time.perf_counter() - began)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        saver.close()

    device = torch.cuda.get_device_name() if engine.device.type == "cuda" else f"{os.cpu_count()} cores"
    print(f"{arguments.model} on {device}, Python {platform.python_version()}, torch {torch.__version__}")
    print(
        f"checkpoint {size / 1e6:.0f} MB, memory {peak_memory(engine.device) / 1e9:.2f} GB, {arguments.rounds} rounds"
    )
    for kind, seconds in stalls.items():
        print(
            f"{kind:>18}: {1e3 * median(seconds):8.1f} ms (from {1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})"
        )
    ratios = [a / b for a, b in zip(stalls["foreground"], stalls["background"], strict=True)]
    print(f"foreground / background: {median(ratios):.1f} (from {min(ratios):.1f} to {max(ratios):.1f})")
    ratio = median(disturbed) / median(quiet)
    print(f"steps while a checkpoint is written / others: {ratio:.2f} ({len(disturbed)} and {len(quiet)} steps)")


if __name__ == "__main__":
    main()
