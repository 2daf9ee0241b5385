"""Codecs for vision models: the plug-in of `objective.target=vision_model` (`hpcm_scale.tasks.TaskPlugin`)."""

from importlib import import_module
from typing import Any

_PROVIDED = {
    "receiver": "receivers",
    "check_size": "extractor",
    "training_objective": "training",
    "training_costs": "training",
    "training_task": "training",
    "encoder": "codec",
    "task_evaluation": "evaluation",
}
"""Modules by what they provide, imported on use: encoding loads no training, and training no evaluation."""


def __getattr__(name: str) -> Any:
    if name not in _PROVIDED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PROVIDED[name]}"), name)
