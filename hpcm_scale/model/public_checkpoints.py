"""Read and write checkpoints of the public implementation (github.com/lyq133/LIC-HPCM).

They are `torch.save(net.state_dict())`: parameters, and buffers of the entropy coder. Published ones lack the channel
scales q (`adaptive_params_list`), which were in a Python list during training, neither saved nor optimized: they are
ones (issue 11 there).
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import Tensor

from hpcm_scale.config.compose import compose_model
from hpcm_scale.config.schema import HyperPlacement, ModelConfig
from hpcm_scale.entropy.generalized_gaussian import LIKELIHOOD_BOUND, SCALE_BOUND, SHAPE
from hpcm_scale.errors import UserError
from hpcm_scale.files import atomic_file, utf_8_path
from hpcm_scale.model.parameters import on_meta

# Names of parameters.


PUBLISHED = {"68m": "HPCM_Base", "64m_phi": "HPCM_Base_PhiContext", "90m": "HPCM_Large", "1b": "HPCM_1B"}
"""Presets of the public implementation, with their names there."""

_TRANSFORM_BLOCK = {"spatial": "branch.0.pconv", "expand": "branch.1", "reduce": "branch.3"}
_CONTEXT_BLOCK = {"spatial": "branch.0", "expand": "branch.1", "reduce": "branch.3"}
_FUSION = {"query": "conv_q", "key": "conv_k", "value": "conv_v", "skip": "conv_out"}


def public_name(name: str, config: ModelConfig) -> str:
    """The public implementation's name of our parameter `name`.

    The public 1B names its transforms by stage; the others number their layers as we do.
    """
    part, _, rest = name.partition(".")
    if part in ("g_a", "g_s", "h_a", "h_s"):
        index, _, leaf = rest.partition(".")
        return f"{_layer(part, int(index), config)}.{_leaf(leaf, _TRANSFORM_BLOCK)}"
    if part == "hyper_prior":
        return f"{rest}_hyper"
    part, _, rest = rest.partition(".")
    if part == "q":
        return f"adaptive_params_list.{rest.removesuffix('.weight')}"
    if part == "merge":
        return f"context_net.{rest}"
    if part == "fusion":
        level, layer, leaf = rest.split(".")
        return f"attn_s{int(level) + 1}.{_FUSION[layer]}.{leaf}"
    if part == "adaptors":
        level, index, leaf = rest.split(".", 2)
        block, _, inner = leaf.partition(".")
        leaf = f"{block}.{_leaf(inner, _CONTEXT_BLOCK)}" if inner else leaf
        return f"y_spatial_prior_adaptor_list_s{int(level) + 1}.{_rotated(level, index)}.{leaf}"
    half, index, leaf = rest.split(".", 2)
    branch = {"before": "branch_1", "after": "branch_2"}[half]
    return f"y_spatial_{part}.{branch}.{index}.{_leaf(leaf, _CONTEXT_BLOCK)}"


def _leaf(leaf: str, block: dict[str, str]) -> str:
    layer, _, parameter = leaf.partition(".")
    return f"{block[layer]}.{parameter}" if parameter else leaf  # a convolution of its own, not in a block


def _rotated(level: str, index: str) -> int:
    """The public implementation uses the adaptors of s2 and s3 in the order n−1, 0, 1, …"""
    count = {"0": 1, "1": 3, "2": 6}[level]
    return (int(index) - 1) % count


def _layer(part: str, index: int, config: ModelConfig) -> str:
    if config.stem_kernel == 4:
        return f"{part}.branch.{index}"
    if part.startswith("h_"):
        return f"{part}.{index}"
    counts = config.g_a_blocks if part == "g_a" else config.g_s_blocks
    for level, count in enumerate(counts):
        stage = level + 1 if part == "g_a" else 4 - level
        # g_a resamples before the blocks of a stage, g_s after them.
        position = index - 1 if part == "g_a" else index
        if 0 <= position < count:
            return f"{part}.{part}_chunk{stage}.{position}"
        if index == (0 if part == "g_a" else count):
            return f"{part}.{part}_{'down' if part == 'g_a' else 'up'}{stage}"
        index -= count + 1
    raise AssertionError(f"{part} has no layer {index}")


# State dicts.


_CHANNEL_SCALES = "adaptive_params_list."
# Buffers of one number each, constants here.
_CONSTANTS = {
    "entropy_estimation.beta": SHAPE,
    "entropy_estimation.scale_lower_bound.bound": SCALE_BOUND,
    "entropy_estimation.likelihood_lower_bound.bound": LIKELIHOOD_BOUND,
}
# Buffers that the coder derives from the weights; empty in checkpoints of training.
_TABLES = (
    "scale_table",
    *("quantized_cdf_z", "cdf_length_z", "offset_z"),
    *("quantized_cdf_y", "cdf_length_y", "offset_y"),
)


def published_config(preset: str) -> ModelConfig:
    """The configuration of a key of `PUBLISHED`, with the hyper placement of its training."""
    return replace(compose_model(preset), hyper_placement=HyperPlacement.upstream)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a `.pth.tar`, with public names, on the CPU.

    It may be under the key "state_dict"; DataParallel's prefix is removed. Tensors are memory-mapped where the format
    allows it. No code of the file is run (`weights_only`). Raises UserError if the file is missing or damaged, or its
    state dict holds anything but dense tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            "no-public-checkpoint", "", f"there is no checkpoint at {path}; give a .pth.tar published by the authors"
        )
    try:
        with warnings.catch_warnings(), utf_8_path(path) as plain:
            warnings.simplefilter("ignore")  # about pickle protocols that torch.save does not write
            loaded = torch.load(plain, map_location="cpu", weights_only=True, mmap=is_zipfile(plain))
    except Exception as error:  # a damaged or hostile file can make torch.load raise anything
        if isinstance(error, OSError) and error.strerror:
            raise UserError(
                "unreadable-public-checkpoint", "", f"cannot read {path} ({error.strerror}); check its permissions"
            ) from error
        name = re.search(r"\bGLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if name:
            raise UserError(
                "checkpoint-with-code",
                "",
                f"{path} refers to {name[1]}, but only tensors are loaded from checkpoints; save only the model's "
                "state dict",
            ) from error
        raise UserError(
            "damaged-public-checkpoint", "", f"{path} is damaged or not a PyTorch checkpoint; download it again"
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise UserError("no-state-dict", "", f"{path} holds no state dict; give a .pth.tar published by the authors")
    for name, tensor in state.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not (isinstance(name, str) and dense):
            raise UserError(
                "not-a-tensor",
                "",
                f"{path} holds {name}, which is not a dense tensor; save only the model's state dict",
            )
    wrapped = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in state.items()}


def write_checkpoint(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict as the public implementation does, atomically."""
    with atomic_file(path) as unfinished, unfinished.open("wb") as file:
        torch.save(dict(state), file)


def import_state(state: Mapping[str, Tensor], preset: str) -> dict[str, Tensor]:
    """Convert a state dict with public names to one of our model `preset`, a key of `PUBLISHED`.

    The result shares the tensors of `state`, fp32. If all channel scales q are missing, they are ones. Raises UserError
    that names the first tensor that is missing, unknown or of another shape or dtype, or the preset that `state` fits.
    """
    _check_constants(state)
    weights = {name: tensor for name, tensor in state.items() if name not in _CONSTANTS and name not in _TABLES}
    names = _expected(preset)
    difference = _difference(weights, names)
    if difference:
        for other in PUBLISHED:
            if not _difference(weights, _expected(other)):
                raise UserError(
                    "other-preset",
                    "--preset",
                    f"this is {PUBLISHED[other]}, not {PUBLISHED[preset]}; give --preset {other}",
                )
        raise UserError(
            "checkpoint-mismatch",
            "",
            f"the checkpoint does not fit {PUBLISHED[preset]}: {difference}; give a published one",
        )
    for name, tensor in weights.items():
        if tensor.dtype != torch.float32:
            raise UserError(
                "checkpoint-dtype",
                "",
                f"{name} has dtype {tensor.dtype} instead of {torch.float32}; give a published checkpoint",
            )
    if without_channel_scales(weights):
        weights |= {name: torch.ones(shape) for name, (_, shape) in names.items() if name.startswith(_CHANNEL_SCALES)}
    return {ours: weights[name] for name, (ours, _) in names.items()}


def without_channel_scales(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict with public names lacks the channel scales q, as published ones do."""
    return not any(name.startswith(_CHANNEL_SCALES) for name in state)


def export_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Convert our state dict to public names, with the buffers that the public `load_state_dict` requires.

    The result shares the tensors of `state`. Raises UserError if the public implementation has no such model, or places
    its hyper parameters differently.
    """
    if config.rate.levels > 1:
        raise UserError(
            "export-variable-rate",
            "",
            f"{config.name} has variable rate, but the public implementation has no gains; export a fixed-rate model",
        )
    if published_preset(config) is None:
        raise UserError(
            "export-structure",
            "",
            f"the public implementation has no model with the structure of {config.name}; export one of "
            f"{', '.join(PUBLISHED)}",
        )
    if config.hyper_placement != HyperPlacement.upstream:
        raise UserError(
            "export-placement",
            "model.hyper_placement",
            f"{config.name} was trained with hyper_placement: {config.hyper_placement.value}, but the public "
            "implementation would compute other results from its weights; to export a model, train it with "
            "model.hyper_placement=upstream",
        )
    exported = {public_name(name, config): tensor for name, tensor in state.items()}
    exported |= {name: torch.tensor([value]) for name, value in _CONSTANTS.items()}
    return exported | {name: torch.empty(0) for name in _TABLES}


def published_preset(config: ModelConfig) -> str | None:
    """The key of `PUBLISHED` with the same structure, whatever name, placement and rate; None if there is none."""
    for preset in PUBLISHED:
        same = {"name": config.name, "hyper_placement": config.hyper_placement, "rate": config.rate}
        if replace(compose_model(preset), **same) == config:
            return preset
    return None


def needs_placement(config: ModelConfig) -> bool:
    """Whether a model named as a key of `PUBLISHED` could be exported if its hyper placement were upstream."""
    fits = config.name in PUBLISHED and config.rate.levels == 1  # first: composing takes a second
    return fits and config.hyper_placement != HyperPlacement.upstream and published_preset(config) is not None


@cache
def _expected(preset: str) -> dict[str, tuple[str, torch.Size]]:
    """Public name to our name and shape, for every parameter."""
    config = published_config(preset)
    parameters = on_meta(config).state_dict()
    return {public_name(name, config): (name, tensor.shape) for name, tensor in parameters.items()}


def _difference(weights: Mapping[str, Tensor], names: Mapping[str, tuple[str, torch.Size]]) -> str | None:
    """The first difference between tensors and the parameters of a model, in words; None if they fit."""
    q_is_ones = without_channel_scales(weights)
    for name, (_, shape) in names.items():
        if name not in weights:
            if not (q_is_ones and name.startswith(_CHANNEL_SCALES)):
                return f"it lacks {name}"
        elif weights[name].shape != shape:
            return f"its {name} is {_size(weights[name].shape)} instead of {_size(shape)}"
    for name in weights:
        if name not in names:
            return f"it holds {name}, which is not part of it"
    return None


def _check_constants(state: Mapping[str, Tensor]) -> None:
    for name, value in _CONSTANTS.items():
        tensor = state.get(name, torch.tensor([value]))
        is_number = tensor.dtype == torch.float32 and tensor.numel() == 1
        if not is_number or not math.isclose(tensor.item(), value, rel_tol=1e-6):
            raise UserError(
                "checkpoint-constant",
                "",
                f"{name} is not {value:g}, its value in all published models; give a published checkpoint",
            )


def _size(shape: torch.Size) -> str:
    return "×".join(map(str, shape)) or "one number"
