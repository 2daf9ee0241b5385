"""Training for vision models: the task, its objective and its costs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpcm_scale.compute.tracker import TRAINING_FACTOR, forward_flops
from hpcm_scale.config.schema import MachineConfig
from hpcm_scale.machine.codec import MachineCodec
from hpcm_scale.machine.extractor import TokenExtractor
from hpcm_scale.machine.objective import MachineObjective, reference_tokens
from hpcm_scale.machine.pre_editor import PreEditor
from hpcm_scale.model.hpcm import HPCM, Coded, Noise
from hpcm_scale.model.parameters import forward_flops_per_image, parameter_count, parameters_by_part
from hpcm_scale.model.weights import PreEditorWeights, WeightsFile, load_state, save_weights
from hpcm_scale.objective import Lmbda
from hpcm_scale.training.task import Task

Receivers = Mapping[str, TokenExtractor]


@dataclass
class MachineTask(Task):
    """A codec, with or without a pre-editor, trained for vision models that receive its images."""

    module: MachineCodec
    receivers: Receivers

    @property
    def aim(self) -> str:
        """λ and the receivers."""
        return f"{super().aim}, for {' and '.join(self.receivers)}"

    def forward(self, module: nn.Module, images: Tensor, noise: Noise, level: Tensor | None) -> Coded:
        # Tokens are looked up here: an engine may pass the module a copy of the images, which has none in the cache.
        seen = self.module.receiver
        return module(images, noise, level, reference_tokens(seen, images) if seen else None)

    def place(self, device: torch.device) -> None:
        for module in (self.codec, *self.receivers.values()):
            module.to(device)

    def save(self, path: Path, state: dict[str, Tensor], spent: dict[str, Any], origin: dict[str, Any] | None) -> None:
        codec = _below(state, "codec") or self.codec.state_dict()  # a frozen codec is not in the state
        pre_editor = _below(state, "pre_editor")
        in_front = PreEditorWeights(self.config.machine.pre_editor, pre_editor) if pre_editor else None
        save_weights(path, codec, self.config.model, self.facts(spent, origin), in_front)

    def facts(self, spent: dict[str, Any], origin: dict[str, Any] | None) -> dict[str, Any]:
        return super().facts(spent, origin) | {"receivers": list(self.receivers)}


def _below(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The state dict of a submodule, by the names within it."""
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def training_objective(machine: MachineConfig, lmbda: Lmbda, receivers: Receivers) -> MachineObjective:
    """The loss for these receivers; see `TaskPlugin.training_objective`."""
    return MachineObjective(receivers, machine, lmbda)


def training_task(task: Task, lmbda: Lmbda, origin: WeightsFile | None, receivers: Receivers) -> MachineTask:
    """The training of a codec for these receivers; see `TaskPlugin.training_task`."""
    config, codec = task.config, task.codec
    machine, pre_editor = config.machine, None
    seen = receivers[machine.pre_editor.tokens] if machine.edit and machine.pre_editor.tokens else None
    if machine.edit:
        pre_editor = PreEditor(
            machine.pre_editor,
            seen and seen.token_channels,
            config.model.rate.levels,
            precision=config.engine.precision,
            activation_checkpointing=config.engine.activation_checkpointing,
        )
        if origin and origin.pre_editor:
            load_state(pre_editor, origin.pre_editor.state, origin.path)
    module = MachineCodec(codec, pre_editor, seen, freeze_codec=machine.freeze_codec)
    return MachineTask(config, codec, module, training_objective(machine, lmbda, receivers), receivers)


def training_costs(
    machine: MachineConfig, codec: HPCM, side: int, receivers: Receivers
) -> tuple[dict[str, int], int, list[nn.Module]]:
    """See `TaskPlugin.training_costs`.

    A receiver has two forward passes, of the original and of the decoded image, and a backward pass to its input: three
    in all, as a trained network has. A frozen codec has no gradients of weights: two. Eigenvalues are not counted.
    """
    codec_flops = forward_flops_per_image(codec, side)
    parts, passes = parameters_by_part(codec), TRAINING_FACTOR * codec_flops
    trained: list[nn.Module] = [] if machine.freeze_codec else [codec]
    if machine.freeze_codec:
        parts, passes = {}, (TRAINING_FACTOR - 1) * codec_flops
    on_meta = {name: copy.deepcopy(receiver).to("meta") for name, receiver in receivers.items()}
    x = torch.empty(1, 3, side, side, device="meta")
    flops = {name: forward_flops(receiver, x) for name, receiver in on_meta.items()}
    if machine.edit:
        tokens = machine.pre_editor.tokens or ""
        seen = on_meta.get(tokens)
        with torch.device("meta"):
            pre_editor = PreEditor(machine.pre_editor, seen and seen.token_channels, codec.config.rate.levels)
        total = forward_flops(MachineCodec(codec, pre_editor, seen), x)
        flops["pre_editor"] = total - codec_flops - flops.get(tokens, 0)
        parts["pre_editor"] = parameter_count(pre_editor)
        trained.append(pre_editor)
    return parts, passes + TRAINING_FACTOR * sum(flops.values()), trained
