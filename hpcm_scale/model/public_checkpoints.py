"""Checkpoints of the public implementation (github.com/lyq133/LIC-HPCM), read and written.

Its files are `torch.save(net.state_dict())`: the parameters, and buffers of its entropy coder that hold no
weights. Published ones lack the channel scales q (`adaptive_params_list`): when they were trained these stood
in a plain list, neither saved nor optimized, and so are ones (issue 11 there).
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
from hpcm_scale.files import utf_8_path, whole_file
from hpcm_scale.model.parameters import on_meta

# Parameter names of the public implementation (github.com/lyq133/LIC-HPCM) for ours.


PUBLISHED = {"68m": "HPCM_Base", "64m_phi": "HPCM_Base_PhiContext", "90m": "HPCM_Large", "1b": "HPCM_1B"}
"""The presets that the public implementation has too, and its names for them."""

_TRANSFORM_BLOCK = {"spatial": "branch.0.pconv", "expand": "branch.1", "reduce": "branch.3"}
_CONTEXT_BLOCK = {"spatial": "branch.0", "expand": "branch.1", "reduce": "branch.3"}
_FUSION = {"query": "conv_q", "key": "conv_k", "value": "conv_v", "skip": "conv_out"}


def public_name(name: str, config: ModelConfig) -> str:
    """The public implementation's name of our parameter `name`.

    The public 1B names its transforms by stage; the others number their layers as we do.
    """
    room, _, rest = name.partition(".")
    if room in ("g_a", "g_s", "h_a", "h_s"):
        index, _, leaf = rest.partition(".")
        return f"{_layer(room, int(index), config)}.{_leaf(leaf, _TRANSFORM_BLOCK)}"
    if room == "hyper_prior":
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
    return f"y_spatial_{part}.{_prior_layer(rest)}"


def _leaf(leaf: str, block: dict[str, str]) -> str:
    layer, _, parameter = leaf.partition(".")
    return f"{block[layer]}.{parameter}" if parameter else leaf  # a plain convolution has no layers


def _rotated(level: str, index: str) -> int:
    """The public adaptors of s2 and s3 are used in the order n−1, 0, 1, …"""
    count = {"0": 1, "1": 3, "2": 6}[level]
    return (int(index) - 1) % count


def _prior_layer(rest: str) -> str:
    half, index, leaf = rest.split(".", 2)
    branch = {"before": "branch_1", "after": "branch_2"}[half]
    return f"{branch}.{index}.{_leaf(leaf, _CONTEXT_BLOCK)}"


def _layer(room: str, index: int, config: ModelConfig) -> str:
    if config.stem_kernel == 4:
        return f"{room}.branch.{index}"
    if room.startswith("h_"):
        return f"{room}.{index}"
    counts = config.g_a_blocks if room == "g_a" else config.g_s_blocks
    for level, count in enumerate(counts):
        stage = level + 1 if room == "g_a" else 4 - level
        # g_a samples before the blocks of a stage, g_s after them.
        position = index - 1 if room == "g_a" else index
        if 0 <= position < count:
            return f"{room}.{room}_chunk{stage}.{position}"
        if index == (0 if room == "g_a" else count):
            return f"{room}.{room}_{'down' if room == 'g_a' else 'up'}{stage}"
        index -= count + 1
    raise AssertionError(f"{room} has no layer {index}")


_CHANNEL_SCALES = "adaptive_params_list."
# Buffers of one number each; in our code they are constants.
_CONSTANTS = {
    "entropy_estimation.beta": SHAPE,
    "entropy_estimation.scale_lower_bound.bound": SCALE_BOUND,
    "entropy_estimation.likelihood_lower_bound.bound": LIKELIHOOD_BOUND,
}
# Buffers that its coder derives from the weights before use; empty in what training saves.
_TABLES = (
    "scale_table",
    *("quantized_cdf_z", "cdf_length_z", "offset_z"),
    *("quantized_cdf_y", "cdf_length_y", "offset_y"),
)


def published_config(preset: str) -> ModelConfig:
    """The configuration of a key of `PUBLISHED`, with the placement that its weights were trained with."""
    return replace(compose_model(preset), hyper_placement=HyperPlacement.upstream)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.pth.tar` under the names they have there, on the CPU.

    They are mapped from the file where its format allows. A state dict under the key "state_dict" is found,
    DataParallel's prefix left out. No code in the file is run (`weights_only`). Raises UserError if the
    file is missing or damaged, or its state dict is anything but plain tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}; name a .pth.tar that the authors published")
    try:
        with warnings.catch_warnings(), utf_8_path(path) as plain:
            warnings.simplefilter("ignore")  # about pickle protocols that torch.save does not write
            loaded = torch.load(plain, map_location="cpu", weights_only=True, mmap=is_zipfile(plain))
    except Exception as error:  # a damaged or hostile file can make the reader raise anything
        raise UserError(_why_unread(path, error)) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path} holds no state dict; name a .pth.tar that the authors published")
    for name, tensor in state.items():
        if not isinstance(name, str) or not _is_plain(tensor):
            raise UserError(f"{path} holds {name}, which is no plain tensor; save the model's state dict alone")
    wrapped = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in state.items()}


def write_checkpoint(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors as the public implementation saves its own: a bare state dict, atomically."""
    with whole_file(path) as unfinished, unfinished.open("wb") as file:
        torch.save(dict(state), file)


def import_state(state: Mapping[str, Tensor], preset: str) -> dict[str, Tensor]:
    """The state dict of our model `preset`, a key of `PUBLISHED`, from one with the public names.

    The tensors are those of `state`, not copies, fp32. Missing channel scales q are ones if all are missing.
    Raises UserError that names the first tensor that is missing, unknown or of another shape or type, or
    the preset that `state` does fit.
    """
    _check_constants(state)
    weights = {name: tensor for name, tensor in state.items() if name not in _CONSTANTS and name not in _TABLES}
    names = _expected(preset)
    difference = _difference(weights, names)
    if difference:
        for other in PUBLISHED:
            if not _difference(weights, _expected(other)):
                raise UserError(f"this is {PUBLISHED[other]}, not {PUBLISHED[preset]}: give --preset {other}")
        raise UserError(f"the checkpoint does not fit {PUBLISHED[preset]}: {difference}; give a published one")
    for name, tensor in weights.items():
        if tensor.dtype != torch.float32:
            raise UserError(f"{name} is of {tensor.dtype} instead of {torch.float32}; give a published checkpoint")
    if without_channel_scales(weights):
        weights |= {name: torch.ones(shape) for name, (_, shape) in names.items() if name.startswith(_CHANNEL_SCALES)}
    return {ours: weights[name] for name, (ours, _) in names.items()}


def without_channel_scales(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict with the public names lacks the channel scales q, as the published ones do."""
    return not any(name.startswith(_CHANNEL_SCALES) for name in state)


def export_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict under the public names, with the buffers that the public `load_state_dict` asks for.

    The weights are the tensors of `state`, not copies. Raises UserError if the public implementation has no
    such model, or would place its hyper parameters differently.
    """
    if config.rate.levels > 1:
        raise UserError(
            f"{config.name} has variable rate, and the public implementation has no gains; export a model of one rate"
        )
    if published_preset(config) is None:
        raise UserError(
            f"the public implementation has no model of the structure of {config.name}; those of "
            f"{', '.join(PUBLISHED)} can be exported"
        )
    if config.hyper_placement != HyperPlacement.upstream:
        raise UserError(
            f"{config.name} was trained with hyper_placement: {config.hyper_placement.value}, and the public "
            "implementation would compute something else from its weights; train with "
            "model.hyper_placement=upstream what is to be exported"
        )
    exported = {public_name(name, config): tensor for name, tensor in state.items()}
    exported |= {name: torch.tensor([value]) for name, value in _CONSTANTS.items()}
    return exported | {name: torch.empty(0) for name in _TABLES}


def published_preset(config: ModelConfig) -> str | None:
    """The key of `PUBLISHED` whose structure a configuration has, whatever its name, placement and rate."""
    for preset in PUBLISHED:
        same = {"name": config.name, "hyper_placement": config.hyper_placement, "rate": config.rate}
        if replace(compose_model(preset), **same) == config:
            return preset
    return None


def needs_placement(config: ModelConfig) -> bool:
    """Whether a model, called by a key of `PUBLISHED`, could be exported but for its placement."""
    fits = config.name in PUBLISHED and config.rate.levels == 1  # first: composing configurations takes a second
    return fits and config.hyper_placement != HyperPlacement.upstream and published_preset(config) is not None


@cache
def _expected(preset: str) -> dict[str, tuple[str, torch.Size]]:
    """Public name to our name and shape, for every parameter."""
    config = published_config(preset)
    parameters = on_meta(config).state_dict()
    return {public_name(name, config): (name, tensor.shape) for name, tensor in parameters.items()}


def _difference(weights: Mapping[str, Tensor], names: Mapping[str, tuple[str, torch.Size]]) -> str | None:
    """What keeps tensors from being the weights of a model, in a few words; None: they are."""
    q_is_ones = without_channel_scales(weights)
    for name, (_, shape) in names.items():
        if name not in weights:
            if not (q_is_ones and name.startswith(_CHANNEL_SCALES)):
                return f"it lacks {name}"
        elif weights[name].shape != shape:
            return f"its {name} is {_size(weights[name].shape)} instead of {_size(shape)}"
    for name in weights:
        if name not in names:
            return f"it holds {name}, which has no place there"
    return None


def _check_constants(state: Mapping[str, Tensor]) -> None:
    for name, value in _CONSTANTS.items():
        tensor = state.get(name, torch.tensor([value]))
        is_number = tensor.dtype == torch.float32 and tensor.numel() == 1
        if not is_number or not math.isclose(tensor.item(), value, rel_tol=1e-6):
            raise UserError(f"{name} is not the {value:g} of every published model; give a published checkpoint")


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _size(shape: torch.Size) -> str:
    return "×".join(map(str, shape)) or "one number"


def _why_unread(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{path} cannot be read: {error.strerror}"
    code = re.search(r"\bGLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if code:
        return (
            f"{path} was not read: it asks for {code[1]}, and nothing but tensors is taken from a file of others; "
            "save the model's state dict alone"
        )
    return f"{path} is damaged, or no checkpoint of PyTorch; download it again"
