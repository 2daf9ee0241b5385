"""What ../shared/reference holds, and models filled as it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from hpcm_scale.model.coding_order import CodingOrder
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.public_checkpoints import import_state, public_name, published_config

PRESETS = {"base": "68m", "phi": "64m_phi", "large": "90m", "1b": "1b"}


class Reference:
    """One variant of the public implementation: its outputs, and our model with its weights."""

    def __init__(self, folder: Path, variant: str) -> None:
        self.variant = variant
        self.facts = json.loads((folder / f"{variant}.json").read_text())
        self.outputs = np.load(folder / f"{variant}.npz")
        self.parameters = {entry["name"]: entry for entry in self.facts["parameters"]}
        config = published_config(PRESETS[variant])
        with torch.device("meta"):  # a billion random numbers that nobody needs
            self.model = HPCM(config, formula="public")
        self.model.context.order = CodingOrder()
        self.names = {name: public_name(name, config) for name in self.model.state_dict()}
        self.model.load_state_dict(import_state(self.public_state(), PRESETS[variant]), assign=True)

    def public_state(self) -> dict[str, torch.Tensor]:
        """The public implementation's parameters, as its state dict holds them."""
        return {name: _filled(entry) for name, entry in self.parameters.items()}

    def image(self) -> torch.Tensor:
        """The crop, fp32 (1, 3, 256, 256) in [0, 1]."""
        return torch.from_numpy(self.outputs["image"]).permute(2, 0, 1)[None].float() / 255

    def output(self, key: str) -> torch.Tensor:
        """One recorded tensor, with a batch dimension of 1."""
        tensor = torch.from_numpy(self.outputs[key].astype(np.float32))
        return tensor if tensor.dim() == 4 else tensor[None]


def _filled(entry: dict) -> torch.Tensor:
    generator = torch.Generator().manual_seed(entry["seed"])
    tensor = torch.randn(entry["shape"], generator=generator) * entry["std"] + entry["mean"]
    return tensor.abs() if entry["name"] == "scales_hyper" else tensor
