"""Weights that a new model starts from: those of a trained one of the same build, of one rate or of many."""

from __future__ import annotations

from dataclasses import replace

import torch

from hpcm_scale.config.compose import to_dict
from hpcm_scale.config.schema import ModelConfig, RateConfig
from hpcm_scale.errors import UserError
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.sharding import shape_of
from hpcm_scale.model.weights import WeightsFile, load_state


def check_inheritance(config: ModelConfig, file: WeightsFile) -> None:
    """Raises UserError unless a model of this configuration can start from these weights."""
    ours, theirs = _build(config), _build(file.config)
    for key, value in ours.items():
        if theirs[key] != value:
            raise UserError(
                f"init_from={file.path} is a model with model.{key}={theirs[key]}, not {value}; start from one that is "
                f"built like model={config.name}"
            )
    if file.config.rate.levels > 1 and file.config.rate != config.rate:
        raise UserError(
            f"init_from={file.path} has variable rate with model.rate={to_dict(file.config.rate)}; give the same to go "
            "on from it, or start from a model of one rate"
        )


def inherit(model: HPCM, file: WeightsFile) -> None:
    """Have `model` take over the weights of `file`, which `check_inheritance` has passed.

    A variable-rate model that starts from one of fixed rate has that one's channel scales at all levels, and its own
    gains, which are 1 at `rate.reference`.
    """
    state = dict(file.state)
    for name, own in model.named_parameters():
        shape = shape_of(own)
        if name not in state:
            state[name] = own  # gains
        elif state[name].shape != shape and state[name].shape[1:] == shape[1:]:
            state[name] = torch.cat([state[name]] * shape[0])
    load_state(model, state, file.path)


def _build(config: ModelConfig) -> dict:
    """What of a configuration decides on names and shapes of weights, but for levels."""
    build = to_dict(replace(config, rate=RateConfig()))
    del build["name"], build["rate"]
    return build
