"""Weights for use: one safetensors file with its configuration inside."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hpcm_scale.config.checks import check_pre_editor
from hpcm_scale.config.compose import from_dict, model_from_dict, to_dict
from hpcm_scale.config.schema import Distortion, ModelConfig, PreEditorConfig, RateConfig
from hpcm_scale.devices import device_kind
from hpcm_scale.errors import UserError
from hpcm_scale.files import utf_8_path, whole_file
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.parameters import on_meta, shape_of, whole

WEIGHTS_NAME = "weights.safetensors"
"""In a run folder."""
PRE_EDITOR = "pre_editor."
"""What the names of a pre-editor's tensors begin with."""
_FORMAT = "hpcm_scale weights 1"


class WeightsFile(NamedTuple):
    """What a weights file holds."""

    path: Path
    config: ModelConfig
    facts: dict[str, Any]
    """λ, steps, images, compute, … of the training: plain JSON values."""
    state: dict[str, Tensor]
    """Of the codec."""
    pre_editor: PreEditorWeights | None
    """Of the network in front of it, where there is one; decoding does without."""


class PreEditorWeights(NamedTuple):
    """A pre-editor's configuration and state dict."""

    config: PreEditorConfig
    state: dict[str, Tensor]


def save_weights(
    path: str | Path,
    state: dict[str, Tensor],
    config: ModelConfig,
    facts: dict[str, Any],
    pre_editor: PreEditorWeights | None = None,
) -> None:
    """Write a state dict and its model's configuration; `facts` (λ, step, …) are plain JSON values."""
    metadata = {
        "format": _FORMAT,
        "model": json.dumps(to_dict(config)),
        "facts": json.dumps(facts),
    }
    if pre_editor:
        metadata["pre_editor"] = json.dumps(to_dict(pre_editor.config))
        state = state | {PRE_EDITOR + name: tensor for name, tensor in pre_editor.state.items()}
    with whole_file(path) as unfinished:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, unfinished, metadata)


def exported_step(path: str | Path) -> int | None:
    """The optimizer step of a weights file, None if there is no readable one."""
    try:
        with utf_8_path(path) as plain, safe_open(plain, framework="pt") as file:
            return json.loads(file.metadata()["facts"])["step"]
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None


def read_weights_file(path: str | Path) -> WeightsFile:
    """What a weights file, or that of a run folder, holds; on the CPU.

    Raises UserError if there is none, or it is damaged.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"there are no weights at {path}; training leaves them in its run folder")
    try:
        with utf_8_path(path) as plain, safe_open(plain, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); export it again") from error
    if metadata.get("format") != _FORMAT:
        raise UserError(f"{path} was not written by hpcm_scale; give a run folder's weights.safetensors")
    try:
        config = model_from_dict(json.loads(metadata["model"]))
        facts = json.loads(metadata["facts"])
        check_facts(facts)
        editor = from_dict(PreEditorConfig, json.loads(metadata["pre_editor"])) if "pre_editor" in metadata else None
        if editor:
            check_pre_editor(editor)
    except (KeyError, ValueError, UserError) as error:
        raise UserError(f"the description in {path} is damaged ({error}); export it again") from error
    in_front = {name.removeprefix(PRE_EDITOR): state.pop(name) for name in list(state) if name.startswith(PRE_EDITOR)}
    if in_front and editor is None:
        raise UserError(f"{path} has tensors of a pre-editor and no description of it; export it again")
    return WeightsFile(path, config, facts, state, PreEditorWeights(editor, in_front) if editor else None)


def check_facts(facts: object) -> None:
    """Raises ValueError unless these are facts, and those of all that they come from, too."""
    if not isinstance(facts, dict):
        raise ValueError("its facts are no dictionary")
    if facts.get("distortion", "mse") not in [each.value for each in Distortion]:
        raise ValueError(f"its facts name the distortion {facts['distortion']!r}")
    if "origin" in facts:
        origin = facts["origin"]
        check_facts(origin.get("facts") if isinstance(origin, dict) else None)


def load_weights(path: str | Path) -> tuple[HPCM, dict[str, Any]]:
    """The codec of a weights file, on the CPU and in evaluation mode, and the facts beside it.

    Raises UserError if the file is missing, is no such file, or does not fit its own configuration.
    """
    file = read_weights_file(path)
    return codec_of(file), file.facts


def codec_of(file: WeightsFile) -> HPCM:
    """The codec of what a weights file holds, in evaluation mode. Raises UserError if it does not fit."""
    _check_fit(file)
    model = HPCM(file.config)
    load_state(model, file.state, file.path)
    return model.eval()


def _check_fit(file: WeightsFile) -> None:
    """Raise UserError unless the tensors are those of the model described: nothing is built by its word alone."""
    config, tensors = file.config, file.state.values()
    widths = [*config.channels, config.latent_channels, config.hyper_latent_channels, config.hyper_channels]
    priors = (*vars(config.prior_s1_s2).values(), *vars(config.prior_s3).values())
    blocks = sum([*config.g_a_blocks, *config.g_s_blocks, *config.hyper_blocks, *config.adaptor_blocks, *priors])
    fits = blocks <= len(tensors) and max(widths) <= max((tensor.numel() for tensor in tensors), default=0)
    try:
        fits = fits and _shapes_of(on_meta(config).state_dict()) == _shapes_of(file.state)
    except (UserError, RuntimeError, OverflowError, TypeError) as error:  # torch's own, of sizes beyond all bounds
        reason = str(error).splitlines()[0]
        raise UserError(f"the description in {file.path} is damaged ({reason}); export it again") from error
    if not fits:
        raise UserError(f"the tensors in {file.path} do not fit the model it describes; export it again")


def _shapes_of(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


@torch.no_grad()
def load_state(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Have a module, sharded or not, take over the state dict of a file, one parameter at a time.

    Raises UserError if it does not fit.
    """
    parameters = dict(module.named_parameters())  # no module has persistent buffers
    shapes = {name: shape_of(parameter) for name, parameter in parameters.items()}
    if shapes != {name: shape_of(tensor) for name, tensor in state.items()}:
        raise UserError(f"the tensors in {path} do not fit the model it describes; export it again")
    for name, parameter in parameters.items():
        with whole(parameter):
            parameter.copy_(state[name])


def device_of(name: str | None) -> torch.device:
    """The device of that name, by default that of `device_kind`, once it has been seen to work.

    Raises UserError for one that cannot be used here.
    """
    name = name or device_kind()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); leave it out, or name cpu") from error
    return device


def digest(model: HPCM) -> bytes:
    """SHA-256 of what a model computes with: its tensors, and its configuration where that is not the default.

    So a field that is added later, with a default under which nothing changes, leaves the files of today readable.
    """
    default = to_dict(ModelConfig())
    config = {key: value for key, value in to_dict(model.config).items() if value != default[key] and key != "name"}
    hashed = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(f"{name} {tuple(tensor.shape)} ".encode())
        hashed.update(np.ascontiguousarray(tensor.detach().float().cpu().numpy(), dtype="<f4"))
    return hashed.digest()


# Weights that a new model starts from: those of a trained one of the same build, of one rate or of many.


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
