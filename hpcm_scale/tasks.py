"""Registry of tasks other than images for human viewers.

A task is a package that is imported by name when a configuration, a weights file or a command line needs it; plain
training, encoding, decoding and evaluation never load it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Size, Tensor, nn

from hpcm_scale.config.schema import MachineConfig, Target
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.weights import WeightsFile, codec_of, read_weights_file
from hpcm_scale.objective import Lmbda, Objective

Edit = Callable[[Tensor], Callable[[float | None], Tensor]]
"""Maps an image, uint8 (3, H, W), to a function that returns the edited image, fp32 (3, H, W), for a level or None.

So the receiver evaluates an image once for all levels.
"""


class Encoder(NamedTuple):
    """The networks of a weights file, as encoding and evaluation use them."""

    codec: HPCM
    module: nn.Module
    """Has the forward pass and the `precision` of `HPCM`: the codec, or a pre-editor followed by the codec."""
    edit: Edit | None = None
    """The pre-editor; decoding does not need it."""


class TaskPlugin(Protocol):
    """Functions that the package of a task provides."""

    def receiver(self, name: str) -> nn.Module:
        """The frozen network called `name`, on the CPU. Raises UserError for an unknown name or a missing package."""
        ...

    def check_size(self, size: Size, name: str, remedy: str) -> None:
        """Raises UserError, which names the image and the remedy, if (height, width) is too small for receivers."""
        ...

    def training_objective(self, machine: MachineConfig, lmbda: Lmbda, receivers: Mapping[str, nn.Module]) -> Objective:
        """The loss for these receivers. Raises UserError if the configuration does not suit them."""
        ...

    def training_costs(
        self, machine: MachineConfig, codec: HPCM, side: int, receivers: Mapping[str, nn.Module]
    ) -> tuple[dict[str, int], int, list[nn.Module]]:
        """Trained parameters by part, model FLOPs of training on one side×side crop, and the trained modules.

        `codec` and the modules are on `meta`.
        """
        ...

    def training_task(
        self, task: Any, lmbda: Lmbda, origin: WeightsFile | None, receivers: Mapping[str, nn.Module]
    ) -> Any:
        """The `training.task.Task` for these receivers, from a plain one whose codec has the weights of `origin`."""
        ...

    def encoder(self, file: WeightsFile, codec: HPCM) -> Encoder:
        """A codec with the pre-editor of its weights file. Raises UserError if the receiver cannot be loaded."""
        ...

    def task_evaluation(self, tasks: Sequence[str], receivers: Sequence[str], device: torch.device) -> Any:
        """The `machine.evaluation.TaskEvaluation` of `hpcm evaluate --task`. Raises UserError for unknown receivers."""
        ...


PLUGINS = {Target.vision_model: "hpcm_scale.machine"}
"""The package of each target of training but `human`."""


def plugin(target: Target = Target.vision_model) -> TaskPlugin:
    """The package of a target other than `human`, imported on the first call."""
    return cast(TaskPlugin, import_module(PLUGINS[target]))


def receiver(name: str) -> nn.Module:
    """See `TaskPlugin.receiver`."""
    return plugin().receiver(name)


def load_encoder(path: str | Path) -> Encoder:
    """The networks of a weights file, on the CPU and in evaluation mode.

    Raises UserError for a file that is damaged or of another kind, and if the receiver that the pre-editor needs
    cannot be loaded. Decoding needs only the codec: `model.weights.load_weights`.
    """
    file = read_weights_file(path)
    codec = codec_of(file)
    return plugin().encoder(file, codec) if file.pre_editor else Encoder(codec, codec)
