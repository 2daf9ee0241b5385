"""A task: the module that the engine trains, its loss, its data, its evaluation, and the export of its weights."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpcm_scale.config.compose import to_dict
from hpcm_scale.config.schema import Config, DataConfig, Distortion, Parametrisation, Start
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.data.mixture import Mixture
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.data.stream import Batch, open_stream
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.estimate import Evaluation, Reconstruction, evaluate
from hpcm_scale.files import sha256_of
from hpcm_scale.model.hpcm import HPCM, Coded, Noise
from hpcm_scale.model.parameters import parametrise
from hpcm_scale.model.start import karhunen_loeve_start, lmbda_of_start
from hpcm_scale.model.variable_rate import level_of, lmbda_of
from hpcm_scale.model.weights import WeightsFile, init_from_weights, save_weights
from hpcm_scale.objective import Objective, RateDistortion, RateDistortionObjective
from hpcm_scale.tasks import plugin
from hpcm_scale.training.ema import EMA, ema_kind
from hpcm_scale.training.engines.base import Engine

# Uniform noise of the training likelihoods, seeded per image so that it does not depend on the number of processes.


def image_noise(model: HPCM, images: Tensor, image_index: Tensor, seed: int) -> Noise:
    """Noise in [−½, ½) for a batch of images (b, 3, H, W) with global indices (b,), fp32.

    The same (seed, global image index) gives the same noise on any number of processes.
    """
    shape_y, shape_z = model.latent_shapes(*images.shape[2:])
    generator = torch.Generator(images.device)
    ys, zs = [], []
    for index in image_index.tolist():
        generator.manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> 1))
        ys.append(torch.rand(shape_y, generator=generator, device=images.device))
        zs.append(torch.rand(shape_z, generator=generator, device=images.device))
    return Noise(torch.stack(ys) - 0.5, torch.stack(zs) - 0.5)


def image_levels(levels: int, image_index: Tensor, seed: int) -> Tensor:
    """The level of a variable-rate model for each image of a batch with global indices (b,): (b,) fp32.

    Every group of `levels` consecutive images has each level once, in random order. The same (seed, global image index)
    gives the same level on any number of processes.
    """
    chosen = []
    for index in image_index.tolist():
        run, place = divmod(index, levels)
        order = np.random.default_rng((seed, run, _LEVELS)).permutation(levels)
        chosen.append(float(order[place]))
    return torch.tensor(chosen)


_LEVELS = 1
"""Separates the random levels from other draws with the same seed and index."""


# Micro-batches.


def batches(
    data: DataConfig, seed: int, spec: RunSpec, step: int, *, rank: int, index: Mixture, left_out: Sequence[range]
) -> Generator[Batch, None, None]:
    """The micro-batches of process `rank`, in order, from optimizer step `step` (from 0) on, without end.

    Each phase of crops has its own data workers. `index` and `left_out` as in `data.stream.open_stream`, which may
    raise UserError during the iteration. Close it after use.
    """
    left = [phase for phase in spec.phases if step < phase.last_step]
    for phase in left:
        stream = open_stream(
            replace(data, crop=phase.crop),
            seed=seed,
            first_image=spec.images_at(max(step, phase.first_step)),
            last_image=None if phase is left[-1] else spec.images_at(phase.last_step),
            batch_size=phase.batch_size,
            micro_batch_size=phase.micro_batch_size,
            rank=rank,
            world_size=spec.world_size,
            mixture=index,
            skip=left_out,
        )
        with closing(stream):
            yield from stream


Receivers = Mapping[str, nn.Module]
Means = dict[str, dict[str, float]]
"""Loss, bpp, PSNR and so on, means over the images, of the weights (`eval`) and their averages (`eval_ema_…`)."""


@dataclass
class Task:
    """A codec, trained for human viewers."""

    config: Config
    codec: HPCM
    module: nn.Module
    """What the engine trains; has the call signature of the codec."""
    objective: Objective

    @property
    def aim(self) -> str:
        """λ and its distortion as text."""
        rate, objective = self.config.model.rate, self.config.objective
        of = " of MS-SSIM" if objective.distortion == Distortion.ms_ssim else ""
        if rate.levels == 1:
            return f"λ{of} = {objective.lmbda:g}"
        return f"λ{of} = {rate.lowest:g} … {rate.highest:g} in {rate.levels} levels"

    def loss(self, module: nn.Module, batch: Batch, device: torch.device) -> RateDistortion:
        """Loss and its parts for one micro-batch, (b,) each; `module` is the engine's."""
        images = batch.images.to(device, non_blocking=True)
        images = images.to(torch.float32, memory_format=torch.channels_last) / 255
        seed, levels = self.config.train.seed, self.config.model.rate.levels
        noise = image_noise(self.codec, images, batch.image_index, seed)
        level = image_levels(levels, batch.image_index, seed).to(device, non_blocking=True) if levels > 1 else None
        return self.objective(images, self.forward(module, images, noise, level), level)

    def forward(self, module: nn.Module, images: Tensor, noise: Noise, level: Tensor | None) -> Coded:
        """Forward pass of the engine's module."""
        return module(images, noise, level)

    def measure(
        self, images: ImageSet, engine: Engine, averages: EMA, alive: Callable[[], None], multiple: int, shown: int
    ) -> tuple[Means, list[Reconstruction]]:
        """Evaluate the weights and their averages; rank 0 gets `shown` reconstructions.

        Collective; `alive` is called after each image. Images are padded to sides that are multiples of `multiple`
        pixels. Raises CollectiveError on all ranks if an image cannot be read or memory runs out, and Fault on one rank
        if its part of a sharded forward pass fails.
        """
        rate = self.config.model.rate

        def evaluation(keep: int) -> Evaluation:
            return evaluate(
                engine.module,
                images,
                multiple=multiple,
                objective=self.objective,
                level=level_of(rate, self.config.objective.lmbda) if rate.levels > 1 else None,
                device=engine.device,
                rank=engine.rank,
                world_size=engine.world_size,
                reduce=engine.reduce,
                together=engine.run_collectively,
                keep=keep,
                progress=alive,
            )

        engine.module.eval()
        try:
            result = evaluation(keep=shown if engine.rank == 0 else 0)
            means = {"eval": result.mean()}
            for length in averages.lengths:
                with averages.in_place(length):
                    means[f"eval_{ema_kind(length)}"] = evaluation(keep=0).mean()
            return means, result.reconstructions
        finally:
            engine.module.train()

    def place(self, device: torch.device) -> None:
        """Move the modules that are not trained to the device."""

    def save(self, path: Path, state: dict[str, Tensor], spent: dict[str, Any], origin: dict[str, Any] | None) -> None:
        """Export the weights.

        `state`: of the trained module; `spent`: steps, images, PFLOPs; `origin`: see `origin_of`.
        """
        save_weights(path, state, self.config.model, self.facts(spent, origin))

    def facts(self, spent: dict[str, Any], origin: dict[str, Any] | None) -> dict[str, Any]:
        """Metadata of the weights file: plain JSON values."""
        fixed = self.config.model.rate.levels == 1
        before = (origin["facts"].get("total_pflops") or origin["facts"].get("pflops") or 0.0) if origin else 0.0
        return {
            "lmbda": self.config.objective.lmbda if fixed else None,
            "distortion": self.config.objective.distortion.value,
            "precision": self.config.engine.precision.value,
            **spent,
            "total_pflops": before + spent["pflops"],
            **({"origin": origin} if origin else {}),
        }


def origin_of(file: WeightsFile | None) -> dict[str, Any] | None:
    """Metadata of the weights that a run starts from: plain JSON values."""
    return {"path": str(file.path), "sha256": sha256_of(file.path), "facts": file.facts} if file else None


def task_of(config: Config, origin: WeightsFile | None, receivers: Receivers) -> Task:
    """The task of a configuration, with the weights of its `origin`; for `receivers`, if there are any."""
    codec = HPCM(
        config.model,
        precision=config.engine.precision,
        formula=config.objective.likelihood.value,
        activation_checkpointing=config.engine.activation_checkpointing,
    )
    if config.train.parametrisation == Parametrisation.mup:
        parametrise(codec)
    if config.model.start == Start.klt and not origin:
        karhunen_loeve_start(codec, lmbda_of_start(config.model.rate, config.objective))
    if origin:
        init_from_weights(codec, origin)
    rate, objective = config.model.rate, config.objective
    lmbda = partial(lmbda_of, rate) if rate.levels > 1 else objective.lmbda
    task = Task(config, codec, codec, RateDistortionObjective(lmbda, objective.distortion))
    return plugin(objective.target).training_task(task, lmbda, origin, receivers) if receivers else task


def check_origin(config: Config, file: WeightsFile) -> None:
    """Raise UserError if the weights have a pre-editor that the configuration does not continue to train."""
    if file.pre_editor is None:
        return
    if not config.machine.edit:
        raise UserError(
            "dropped-pre-editor",
            "machine.edit",
            f"init_from={file.path} has a pre-editor, which machine.edit=false would drop; set machine.edit=true",
        )
    if file.pre_editor.config != config.machine.pre_editor:
        raise UserError(
            "other-pre-editor",
            "machine.pre_editor",
            f"init_from={file.path} has a pre-editor with machine.pre_editor={to_dict(file.pre_editor.config)}; set "
            "the same",
        )
