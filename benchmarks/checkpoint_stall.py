"""How long does training stand still for a checkpoint? Written in the background, and written at once.

    python benchmarks/checkpoint_stall.py [--model small] [--rounds 7]

One process trains on random crops; every few steps it saves a checkpoint, in turns one that is written while the next
steps go on and one that is waited for. Printed: how long training waited for each kind, the bare copy of the same
values, and how long the steps took during which a checkpoint was being written, against others.
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
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.objective import rate_distortion_loss
from hpcm_scale.tracking.progress import progress
from hpcm_scale.training.checkpoints import Checkpoints, Retention, Saver
from hpcm_scale.training.engines import create_engine
from hpcm_scale.training.task import image_noise

STEPS_PER_ROUND = 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="small")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    config = compose([f"model={arguments.model}", "engine=accelerate", "train.batch_size=2"])
    engine = create_engine(config)
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
    stalls: dict[str, list[float]] = {"in the background": [], "waited for": [], "the copy alone": []}
    quiet, disturbed = [], []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        saver = Saver(engine, Checkpoints(folder), Retention(keep=1), before=lambda: None)
        number = 0
        for turn in progress(range(arguments.rounds + 1), description="rounds", unit="round"):
            for kind in ("in the background", "waited for"):
                number += 1
                began = time.perf_counter()
                saver.begin({"step": number})
                if kind == "waited for":
                    saver.finish()
                stall = time.perf_counter() - began
                steps = [step() for _ in range(STEPS_PER_ROUND)]
                ended = saver.finish()
                assert not ended, ended
                if turn:  # the first round makes the buffers
                    stalls[kind].append(stall)
                    (disturbed if kind == "in the background" else quiet).extend(steps)
            pieces = engine.pieces()
            copies = [torch.empty_like(piece.values, device="cpu") for piece in pieces]
            for copy in copies:
                copy.zero_()
            began = time.perf_counter()
            for copy, piece in zip(copies, pieces, strict=True):
                copy.copy_(piece.values)
            if turn:
                stalls["the copy alone"].append(time.perf_counter() - began)
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
    ratios = [a / b for a, b in zip(stalls["waited for"], stalls["in the background"], strict=True)]
    print(f"waited for / in the background: {median(ratios):.1f} (from {min(ratios):.1f} to {max(ratios):.1f})")
    ratio = median(disturbed) / median(quiet)
    print(f"steps while one is written / others: {ratio:.2f} ({len(disturbed)} and {len(quiet)} steps)")


if __name__ == "__main__":
    main()
