"""Weights for inference: one safetensors file that includes the configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hpcm_scale.config.checks import check_pre_editor
from hpcm_scale.config.compose import from_dict, model_from_dict, to_dict
from hpcm_scale.config.schema import Distortion, ModelConfig, PreEditorConfig
from hpcm_scale.devices import device_kind
from hpcm_scale.errors import UserError
from hpcm_scale.files import atomic_file, utf_8_path
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.parameters import gathered, on_meta, shape_of

WEIGHTS_NAME = "weights.safetensors"
"""File name in a run folder."""
PRE_EDITOR = "pre_editor."
"""Prefix of the names of a pre-editor's tensors."""
_FORMAT = "hpcm_scale weights 1"


class WeightsFile(NamedTuple):
    """The content of a weights file."""

    path: Path
    config: ModelConfig
    facts: dict[str, Any]
    """Metadata of the training as JSON values: λ, steps, images, compute, …"""
    state: dict[str, Tensor]
    """State dict of the codec."""
    pre_editor: PreEditorWeights | None
    """The pre-editor, if there is one; decoding does not need it."""


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
    """Write a state dict, the configuration of its model and `facts` (see `WeightsFile`), atomically."""
    metadata = {
        "format": _FORMAT,
        "model": json.dumps(to_dict(config)),
        "facts": json.dumps(facts),
    }
    if pre_editor:
        metadata["pre_editor"] = json.dumps(to_dict(pre_editor.config))
        state = state | {PRE_EDITOR + name: tensor for name, tensor in pre_editor.state.items()}
    with atomic_file(path) as unfinished:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, unfinished, metadata)


def exported_step(path: str | Path) -> int | None:
    """The optimizer step of a weights file; None if the file is missing or unreadable."""
    try:
        with utf_8_path(path) as plain, safe_open(plain, framework="pt") as file:
            return json.loads(file.metadata()["facts"])["step"]
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None


def read_weights_file(path: str | Path) -> WeightsFile:
    """Read a weights file, or that of a run folder, to the CPU. Raises UserError if it is missing or damaged."""
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(
            "no-weights-file", "", f"there are no weights at {path}; training writes them to its run folder"
        )
    try:
        with utf_8_path(path) as plain, safe_open(plain, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            "damaged-weights", "", f"{path} is not a readable safetensors file ({error}); export it again"
        ) from error
    if metadata.get("format") != _FORMAT:
        raise UserError(
            "foreign-weights", "", f"{path} was not written by hpcm_scale; give the weights.safetensors of a run folder"
        )
    try:
        config = model_from_dict(json.loads(metadata["model"]))
        facts = json.loads(metadata["facts"])
        check_facts(facts)
        editor = from_dict(PreEditorConfig, json.loads(metadata["pre_editor"])) if "pre_editor" in metadata else None
        if editor:
            check_pre_editor(editor)
    except (KeyError, ValueError, UserError) as error:
        raise UserError(
            "damaged-weights-metadata", "", f"the metadata of {path} is damaged ({error}); export it again"
        ) from error
    edit = {name.removeprefix(PRE_EDITOR): state.pop(name) for name in list(state) if name.startswith(PRE_EDITOR)}
    if edit and editor is None:
        raise UserError(
            "no-pre-editor-configuration",
            "",
            f"{path} has tensors of a pre-editor without its configuration; export it again",
        )
    return WeightsFile(path, config, facts, state, PreEditorWeights(editor, edit) if editor else None)


def check_facts(facts: object) -> None:
    """Raise ValueError unless `facts`, and those of the weights they were initialized from, are valid."""
    if not isinstance(facts, dict):
        raise ValueError("its facts are not a dictionary")
    if facts.get("distortion", "mse") not in [each.value for each in Distortion]:
        raise ValueError(f"its distortion is {facts['distortion']!r}")
    if "origin" in facts:
        origin = facts["origin"]
        check_facts(origin.get("facts") if isinstance(origin, dict) else None)


def load_weights(path: str | Path) -> tuple[HPCM, dict[str, Any]]:
    """Load the codec of a weights file, on the CPU in evaluation mode, and its `facts`.

    Raises UserError if the file is missing or damaged, or its tensors do not fit its configuration.
    """
    file = read_weights_file(path)
    return codec_of(file), file.facts


def codec_of(file: WeightsFile) -> HPCM:
    """The codec of a weights file, in evaluation mode. Raises UserError if its tensors do not fit its configuration."""
    _check_fit(file)
    model = HPCM(file.config)
    load_state(model, file.state, file.path)
    return model.eval()


def _check_fit(file: WeightsFile) -> None:
    """Raise UserError unless the tensors fit the configuration, before a model of any size is allocated."""
    config, tensors = file.config, file.state.values()
    widths = [*config.channels, config.latent_channels, config.hyper_latent_channels, config.hyper_channels]
    priors = (*vars(config.prior_s1_s2).values(), *vars(config.prior_s3).values())
    blocks = sum([*config.g_a_blocks, *config.g_s_blocks, *config.hyper_blocks, *config.adaptor_blocks, *priors])
    fits = blocks <= len(tensors) and max(widths) <= max((tensor.numel() for tensor in tensors), default=0)
    try:
        fits = fits and _shapes_of(on_meta(config).state_dict()) == _shapes_of(file.state)
    except (UserError, RuntimeError, OverflowError, TypeError) as error:  # of torch, for impossible sizes
        reason = str(error).splitlines()[0]
        raise UserError(
            "damaged-weights-configuration",
            "",
            f"the configuration in {file.path} is damaged ({reason}); export it again",
        ) from error
    if not fits:
        raise UserError(
            "weights-mismatch", "", f"the tensors in {file.path} do not fit its configuration; export it again"
        )


def _shapes_of(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: shape_of(tensor) for name, tensor in state.items()}


@torch.no_grad()
def load_state(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy the state dict of a file into a module, sharded or not, one parameter at a time.

    Raises UserError if names or shapes differ.
    """
    parameters = dict(module.named_parameters())  # no module has persistent buffers
    if _shapes_of(parameters) != _shapes_of(state):
        raise UserError(
            "state-mismatch", "", f"the tensors in {path} do not fit the network that they are for; export it again"
        )
    for name, parameter in parameters.items():
        with gathered(parameter):
            parameter.copy_(state[name])


def device_of(name: str | None) -> torch.device:
    """The torch device `name`, by default that of `device_kind`. Raises UserError if it does not work here."""
    name = name or device_kind()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            "unusable-device", "--device", f"--device {name} cannot be used here ({reason}); omit it, or use cpu"
        ) from error
    return device


def digest(model: HPCM) -> bytes:
    """SHA-256 of a model's tensors and of its configuration where that differs from the default.

    Fields added later, with a default that changes nothing, keep the digest, so that older files stay readable.
    """
    default = to_dict(ModelConfig())
    ours = to_dict(model.config).items()
    config = {key: value for key, value in ours if value != default[key] and key not in ("name", "start")}
    hashed = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(f"{name} {tuple(tensor.shape)} ".encode())
        hashed.update(np.ascontiguousarray(tensor.detach().float().cpu().numpy(), dtype="<f4").data)
    return hashed.digest()


# Initialization of a new model from trained weights (`init_from`).


def check_init_from(config: ModelConfig, file: WeightsFile) -> None:
    """Raise UserError unless a model of this configuration can be initialized from these weights."""
    ours, theirs = _structure(config), _structure(file.config)
    for key, value in ours.items():
        if theirs[key] != value:
            raise UserError(
                "init-from-structure",
                f"model.{key}",
                f"init_from={file.path} is a model with model.{key}={theirs[key]}, not {value}; start from one with "
                f"the structure of model={config.name}",
            )
    if file.config.rate.levels > 1 and file.config.rate != config.rate:
        raise UserError(
            "init-from-rate",
            "model.rate",
            f"init_from={file.path} has variable rate with model.rate={to_dict(file.config.rate)}; set the same, or "
            "start from a fixed-rate model",
        )


def init_from_weights(model: HPCM, file: WeightsFile) -> None:
    """Initialize `model` with the weights of `file`, after `check_init_from`.

    A variable-rate model initialized from a fixed-rate one has its channel scales at all levels, and keeps its own
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


def _structure(config: ModelConfig) -> dict:
    """The part of a configuration that determines names and shapes of weights, except levels."""
    structure = to_dict(config)
    for key in ("name", "rate", "start"):
        del structure[key]
    return structure
