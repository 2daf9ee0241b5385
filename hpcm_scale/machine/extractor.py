"""Base class of receivers: frozen networks that map images to tokens."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from hpcm_scale.data import sources
from hpcm_scale.errors import UserError
from hpcm_scale.model.layers import full_precision

# Optional packages and the weights in them.


REMEDY = "install hpcm-scale[machine]"
"""For missing packages."""


def required(receiver: str, module: str, package: str, remedy: str = REMEDY) -> ModuleType:
    """Import a module. Raises UserError if its `package` is not installed or fails to load."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            "no-receiver-package",
            "machine.receivers",
            f"{receiver} needs the package {package} ({error}); {remedy}",
        ) from error


def packaged_file(receiver: str, package: str, path: str) -> Path:
    """The file at `path` inside an installed package, which is not imported. Raises UserError if one is missing."""
    module = package.replace("-", "_")
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "no-weights-package",
            "machine.receivers",
            f"{receiver} needs the package {package}; {REMEDY} with a Python version that {package} supports",
        )
    file = Path(spec.submodule_search_locations[0], path)
    if not file.is_file():
        raise UserError(
            "no-packaged-weights",
            "machine.receivers",
            f"the installed package {package} has no {path}; {REMEDY} again",
        )
    return file


def first_sentence(error: Exception) -> str:
    """The first sentence of another library's error message."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].removesuffix(".")


# Receivers.


SMALLEST_SIDE = 32
"""Smallest side of an image, in pixels."""


class TokenExtractor(nn.Module, ABC):
    """A frozen network that maps images to tokens.

    Its weights have no gradients; gradients flow to the pixels. It stays in evaluation mode and computes in fp32, also
    under autocast (in TF32 if `model.layers.set_arithmetic` allows it). Its operations do not depend on data, so its
    FLOPs are counted on `meta`.
    """

    name: str
    """See `machine.receivers.NAMES`."""
    token_channels: dict[str, int]
    """Channels of the tokens by layer."""
    network: Any
    """The module, of any library."""

    def __init__(self, name: str, network: nn.Module, token_channels: dict[str, int]) -> None:
        super().__init__()
        self.name, self.token_channels = name, token_channels
        self.network = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> TokenExtractor:
        """Stays in evaluation mode, without batch statistics and dropout."""
        return super().train(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Tokens (B, T, C) fp32 by layer, of images (B, 3, H, W) in [0, 1] with sides from 32; else ValueError."""
        with full_precision(x):
            return self.tokens(_checked(x))

    def posterior(self, x: Tensor) -> Tensor | None:
        """Log probabilities (B, classes) fp32 of images as in `forward`; None for a receiver without classes."""
        with full_precision(x):
            return self.log_probabilities(_checked(x))

    @abstractmethod
    def tokens(self, x: Tensor) -> dict[str, Tensor]:
        """`forward` for fp32 images, outside autocast."""

    def log_probabilities(self, x: Tensor) -> Tensor | None:
        """`posterior` for fp32 images, outside autocast."""
        return None


def check_size(size: Size, name: str, remedy: str) -> None:
    """Raises UserError, which names the image and the remedy, if (height, width) is too small for receivers."""
    sources.check_size(size, name, remedy, smallest=SMALLEST_SIDE, who="receivers need")


def _checked(x: Tensor) -> Tensor:
    if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[2:]) < SMALLEST_SIDE:
        raise ValueError(f"images are (B, 3, H, W) with sides from {SMALLEST_SIDE} pixels, not {tuple(x.shape)}")
    return x.float()


def as_tokens(features: Tensor) -> Tensor:
    """Tokens (B, h·w, C), row by row, of a feature map (B, C, h, w)."""
    return features.flatten(2).transpose(1, 2)


def resized(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Resize images (B, C, H, W) to `size`, (height, width), with antialiasing; `mode` as in `F.interpolate`.

    The backward pass of `F.interpolate` has no deterministic algorithm on CUDA. With deterministic algorithms, the same
    result is computed by two matrix products in fp64, which TF32 does not affect.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return F.interpolate(x, size, mode=mode, antialias=True)
    rows, columns = (_interpolation(*sides, mode, x) for sides in zip(x.shape[2:], size, strict=True))
    return (rows @ x.double() @ columns.T).to(x.dtype)


def _interpolation(side: int, new: int, mode: str, like: Tensor) -> Tensor:
    """The matrix (new, side) fp64 that resizes a column of `side` pixels."""
    impulses = torch.eye(side, dtype=torch.float64, device=like.device)
    return F.interpolate(impulses[None, None], (new, side), mode=mode, antialias=True)[0, 0]
