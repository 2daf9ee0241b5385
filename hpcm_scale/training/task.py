"""What is trained, and for what: the module that the engine gets, its loss, and what is exported."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpcm_scale.config.checks import micro_batch_size
from hpcm_scale.config.compose import to_dict
from hpcm_scale.config.phases import images_at, phases
from hpcm_scale.config.schema import Config, Distortion, Parametrisation
from hpcm_scale.data.mixture import Mixture
from hpcm_scale.data.stream import Batch, open_stream
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.estimate import Objective
from hpcm_scale.files import sha256_of
from hpcm_scale.machine.codec import MachineCodec
from hpcm_scale.machine.extractor import TokenExtractor
from hpcm_scale.machine.objective import MachineObjective, reference_tokens
from hpcm_scale.machine.pre_editor import PreEditor
from hpcm_scale.model.hpcm import HPCM, Coded, Noise
from hpcm_scale.model.parameters import parametrise
from hpcm_scale.model.variable_rate import level_of, lmbda_of
from hpcm_scale.model.weights import PreEditorWeights, WeightsFile, inherit, load_state, save_weights
from hpcm_scale.objective import RateDistortion, objective_of

# Uniform noise of the training likelihoods, seeded per image so that it does not depend on who trains it.


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
    """A level of a variable-rate model for each of a batch of images with global indices (b,): (b,) fp32.

    Every run of as many images as there are levels has each level once, in an order of its own. The same (seed, global
    image index) gives the same level on any number of processes.
    """
    chosen = []
    for index in image_index.tolist():
        run, place = divmod(index, levels)
        order = np.random.default_rng((seed, run, _LEVELS)).permutation(levels)
        chosen.append(float(order[place]))
    return torch.tensor(chosen)


_LEVELS = 1
"""Sets the draws of levels apart from other draws of the same seed and index."""


# The micro-batches of a run, from one phase of its crops to the next.


def batches(
    config: Config, step: int, *, rank: int, world_size: int, index: Mixture, left_out: Sequence[range]
) -> Generator[Batch, None, None]:
    """The micro-batches of process `rank`, in order, from optimizer step `step` (from 0) on, without end.

    Where a phase ends, so do its data workers, and those of the next begin; images, `index` and `left_out` as in
    `data.stream.open_stream`. Close it after use. Raises UserError while iterating, as that does.
    """
    left = [phase for phase in phases(config) if step < phase.last_step]
    for phase in left:
        stream = open_stream(
            replace(config.data, crop=phase.crop),
            seed=config.train.seed,
            first_image=images_at(config, max(step, phase.first_step)),
            last_image=None if phase is left[-1] else images_at(config, phase.last_step),
            batch_size=phase.batch_size,
            micro_batch_size=micro_batch_size(config, world_size, phase),
            rank=rank,
            world_size=world_size,
            index=index,
            left_out=left_out,
        )
        with closing(stream):
            yield from stream


Receivers = Mapping[str, TokenExtractor]


@dataclass
class Task:
    """A codec, trained for people."""

    config: Config
    codec: HPCM
    module: nn.Module
    """What the engine trains: called as the codec is."""
    objective: Objective

    @property
    def aim(self) -> str:
        """λ, and of what if not of MSE, in words."""
        rate, objective = self.config.model.rate, self.config.objective
        of = " of MS-SSIM" if objective.distortion == Distortion.ms_ssim else ""
        if rate.levels == 1:
            return f"λ{of} = {objective.lmbda:g}"
        return f"λ{of} = {rate.lowest:g} … {rate.highest:g} in {rate.levels} levels"

    @property
    def evaluation_level(self) -> float | None:
        """At which a variable-rate model is evaluated while it trains."""
        rate = self.config.model.rate
        return level_of(rate, self.config.objective.lmbda) if rate.levels > 1 else None

    def loss(self, module: nn.Module, batch: Batch, device: torch.device) -> RateDistortion:
        """Loss and its parts for one micro-batch, (b,); `module` is the engine's."""
        images = batch.images.to(device, non_blocking=True)
        images = images.to(torch.float32, memory_format=torch.channels_last) / 255
        seed, levels = self.config.train.seed, self.config.model.rate.levels
        noise = image_noise(self.codec, images, batch.image_index, seed)
        level = image_levels(levels, batch.image_index, seed).to(device, non_blocking=True) if levels > 1 else None
        return self.objective(images, self.forward(module, images, noise, level), level)

    def forward(self, module: nn.Module, images: Tensor, noise: Noise, level: Tensor | None) -> Coded:
        """A forward pass of the engine's module."""
        return module(images, noise, level)

    def place(self, device: torch.device) -> None:
        """Bring what is not trained to the device."""

    def save(self, path: Path, state: dict[str, Tensor], spent: dict[str, Any], origin: dict[str, Any] | None) -> None:
        """Write the weights for use.

        `state`: the trained module's; `spent`: steps, images, PFLOPs; `origin`: see `origin_of`.
        """
        save_weights(path, state, self.config.model, self.facts(spent, origin))

    def facts(self, spent: dict[str, Any], origin: dict[str, Any] | None) -> dict[str, Any]:
        """What is told of the weights, beside them: plain JSON values."""
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


@dataclass
class MachineTask(Task):
    """A codec, with or without a pre-editor in front, trained for networks that look at its pictures."""

    module: MachineCodec
    receivers: Receivers

    @property
    def aim(self) -> str:
        """λ and receivers, in words."""
        return f"{super().aim}, for {' and '.join(self.receivers)}"

    def forward(self, module: nn.Module, images: Tensor, noise: Noise, level: Tensor | None) -> Coded:
        # Looked up here: engines may hand the module another tensor, of which nobody knows the tokens.
        seen = self.module.receiver
        return module(images, noise, level, reference_tokens(seen, images) if seen else None)

    def place(self, device: torch.device) -> None:
        for module in (self.codec, *self.receivers.values()):
            module.to(device)

    def save(self, path: Path, state: dict[str, Tensor], spent: dict[str, Any], origin: dict[str, Any] | None) -> None:
        codec = _below(state, "codec") or self.codec.state_dict()
        pre_editor = _below(state, "pre_editor")
        in_front = PreEditorWeights(self.config.machine.pre_editor, pre_editor) if pre_editor else None
        save_weights(path, codec, self.config.model, self.facts(spent, origin), in_front)

    def facts(self, spent: dict[str, Any], origin: dict[str, Any] | None) -> dict[str, Any]:
        return super().facts(spent, origin) | {"receivers": list(self.receivers)}


def origin_of(file: WeightsFile | None) -> dict[str, Any] | None:
    """What is kept of the weights that a run starts from: plain JSON values."""
    return {"path": str(file.path), "sha256": sha256_of(file.path), "facts": file.facts} if file else None


def task_of(config: Config, origin: WeightsFile | None, receivers: Receivers) -> Task:
    """What a configuration trains, from the weights of its `origin` on, for those `receivers` if there are any."""
    codec = HPCM(
        config.model,
        precision=config.engine.precision,
        formula=config.objective.likelihood.value,
        checkpoint=config.engine.activation_checkpointing,
    )
    if config.train.parametrisation == Parametrisation.mup:
        parametrise(codec)
    if origin:
        inherit(codec, origin)
    rate, machine = config.model.rate, config.machine
    lmbda = partial(lmbda_of, rate) if rate.levels > 1 else config.objective.lmbda
    if not receivers:
        return Task(config, codec, codec, objective_of(config.objective.distortion, lmbda))
    seen = receivers[machine.pre_editor.tokens] if machine.edit and machine.pre_editor.tokens else None
    pre_editor = _pre_editor(config, origin, seen) if machine.edit else None
    module = MachineCodec(codec, pre_editor, seen, freeze_codec=machine.freeze_codec)
    return MachineTask(config, codec, module, MachineObjective(receivers, machine, lmbda), receivers)


def _pre_editor(config: Config, origin: WeightsFile | None, seen: TokenExtractor | None) -> PreEditor:
    pre_editor = PreEditor(
        config.machine.pre_editor,
        seen and seen.token_channels,
        config.model.rate.levels,
        precision=config.engine.precision,
        checkpoint=config.engine.activation_checkpointing,
    )
    if origin and origin.pre_editor:
        load_state(pre_editor, origin.pre_editor.state, origin.path)
    return pre_editor


def _below(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The part of a state dict below a submodule, by names within it."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def check_origin(config: Config, file: WeightsFile) -> None:
    """Raises UserError unless the pre-editor of these weights, if there is one, is the one that is to be trained on."""
    if file.pre_editor is None:
        return
    if not config.machine.edit:
        raise UserError(
            f"init_from={file.path} has a pre-editor, and machine.edit=false would drop it; set machine.edit=true"
        )
    if file.pre_editor.config != config.machine.pre_editor:
        raise UserError(
            f"init_from={file.path} has a pre-editor with machine.pre_editor={to_dict(file.pre_editor.config)}; "
            "give the same"
        )
