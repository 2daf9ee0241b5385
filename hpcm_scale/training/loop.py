"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from hpcm_scale.compute.tracker import ComputeTracker
from hpcm_scale.config.checks import accumulation, side_multiple
from hpcm_scale.config.schema import Config
from hpcm_scale.data.image_set import ImageSet
from hpcm_scale.data.stream import Batch
from hpcm_scale.errors import UserError, alone
from hpcm_scale.evaluation.estimate import evaluate
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.objective.rate_distortion import RateDistortion, rate_distortion_loss
from hpcm_scale.training.engine import Engine
from hpcm_scale.training.meter import Meter
from hpcm_scale.training.noise import image_noise
from hpcm_scale.training.recorder import Recorder
from hpcm_scale.training.run_folder import RunFolder
from hpcm_scale.training.schedule import learning_rate
from hpcm_scale.training.signals import StopRequest


@dataclass
class Trainer:
    """One run in one process: `train` goes from `step` to `last_step`, or until it is asked to stop."""

    config: Config
    engine: Engine
    model: HPCM
    folder: RunFolder
    recorder: Recorder
    tracker: ComputeTracker
    images: ImageSet | None
    data_digest: str
    stop: StopRequest
    step: int = 0
    skipped_in_a_row: int = 0
    upscaled: int = 0
    """Photos smaller than the crop so far."""
    meter: Meter = field(default_factory=Meter)

    def train(self, stream: Iterator[Batch]) -> None:
        """Train on the stream; leaves a checkpoint of the last step done."""
        config, last_step = self.config, self.config.train.stop_after or self.config.train.steps
        while self.step < last_step:
            stopping = self.train_step(stream)
            self.step += 1
            if self.step % config.log.every == 0 or self.step == config.train.steps:
                self.log()
            if self.images and (self.step % config.eval.every == 0 or self.step == config.train.steps):
                self.evaluate(self.images)
            due = self.step % config.train.checkpoint_every == 0 or self.step in config.train.keep_at
            if stopping or due or self.step == last_step:
                self.checkpoint()
            if stopping:
                self.recorder.say(f"asked to stop: checkpoint at step {self.step}; the same command goes on")
                return

    def train_step(self, stream: Iterator[Batch]) -> bool:
        """One optimizer step; whether any process was asked to stop."""
        config, engine = self.config, self.engine
        rounds = accumulation(config, engine.world_size)
        measured = torch.zeros(len(RateDistortion._fields) + 2, dtype=torch.float64)
        waited = 0.0
        for _ in range(rounds):
            before = time.perf_counter()
            with alone():
                batch = next(stream)
            waited += time.perf_counter() - before
            result = self.forward(batch)
            engine.backward(result.loss)
            means = torch.stack([value.detach().double() for value in result]).cpu() / rounds
            measured += torch.cat([means, torch.tensor([batch.upscaled, 0.0])])
        rate = learning_rate(config.schedule, self.step, config.train.steps)
        stepped = engine.step(rate)
        measured[-1] = self.stop.received
        *means, upscaled, stopping = engine.reduce(measured).tolist()
        values = dict(zip(RateDistortion._fields, (mean / engine.world_size for mean in means), strict=True))
        self.meter.add(values | {"grad_norm": stepped.grad_norm}, stepped.skipped)
        self.upscaled += int(upscaled)
        self.tracker.step(config.train.batch_size, waited)
        self.recorder.advance(values["loss"])
        self.count_skipped(stepped.skipped)
        return stopping > 0

    def forward(self, batch: Batch) -> RateDistortion:
        """Means over this process's images of one micro-batch."""
        images = batch.images.to(self.engine.device, non_blocking=True).float() / 255
        noise = image_noise(self.model, images, batch.image_index, self.config.train.seed)
        coded = self.engine.module(images, noise)
        lmbda = self.config.objective.lmbda
        return rate_distortion_loss(images, coded.x_hat, coded.bits_y, coded.bits_z, lmbda).mean()

    def count_skipped(self, skipped: bool) -> None:
        """Give up after too many steps in a row without a finite loss and gradient."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped:
            self.recorder.say(f"step {self.step + 1} skipped: its loss or gradient is not finite")
        if self.skipped_in_a_row >= self.config.train.max_skipped:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row, up to step {self.step + 1}, had no finite loss and "
                "gradient; go on from the last checkpoint with other data, or start anew with a lower "
                "schedule.learning_rate"
            )

    def log(self) -> None:
        """One journal line: means over the steps since the last one."""
        means = self.meter.take([*RateDistortion._fields, "grad_norm"])
        rate = learning_rate(self.config.schedule, self.step - 1, self.config.train.steps)
        train = {f"train/{name}": value for name, value in means.items()}
        counts = {"train/learning_rate": rate, "train/upscaled": self.upscaled}
        self.recorder.line(self.position() | train | counts | self.tracker.rates())

    def evaluate(self, images: ImageSet) -> None:
        """Loss at λ, bpp and PSNR on the evaluation images."""
        engine = self.engine
        engine.module.eval()
        with alone():
            evaluation = evaluate(
                engine.module,
                images,
                multiple=side_multiple(self.config.model),
                lmbda=self.config.objective.lmbda,
                device=engine.device,
                rank=engine.rank,
                world_size=engine.world_size,
                reduce=engine.reduce,
                keep=self.config.log.images if engine.rank == 0 else 0,
            )
        engine.module.train()
        self.tracker.restart_clock()
        mean = evaluation.mean()
        self.recorder.pictures(self.step, evaluation.reconstructions)
        self.recorder.line(self.position() | {f"eval/{name}": value for name, value in mean.items()})
        self.recorder.say(
            f"step {self.step}: {self.tracker.pflops:.4g} PFLOPs, evaluation loss {mean['loss']:.4f}, "
            f"{mean['bpp']:.4f} bpp, {mean['psnr']:.2f} dB on {len(images)} images"
        )

    def checkpoint(self) -> None:
        """A point to go on from."""
        self.recorder.sync()
        train = self.config.train
        self.folder.checkpoints.save(self.engine, self.state(), train.keep_checkpoints, train.keep_at)
        self.tracker.restart_clock()

    def position(self) -> dict[str, float]:
        """The keys that every journal line has."""
        return {"step": self.step} | self.tracker.position()

    def state(self) -> dict[str, Any]:
        """Everything outside the engine that a checkpoint needs; plain JSON values."""
        return {
            "step": self.step,
            "skipped_in_a_row": self.skipped_in_a_row,
            "upscaled": self.upscaled,
            "tracker": self.tracker.state(),
            "meter": self.meter.state(),
            "world_size": self.engine.world_size,
            "data": self.data_digest,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's `state`."""
        self.step, self.skipped_in_a_row = state["step"], state["skipped_in_a_row"]
        self.upscaled = state["upscaled"]
        self.tracker.load_state(state["tracker"])
        self.meter = Meter(**state["meter"])
