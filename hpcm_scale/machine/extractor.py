"""What a machine receiver is: a frozen network that turns images into tokens."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from hpcm_scale.data import sources
from hpcm_scale.errors import UserError
from hpcm_scale.model.layers import full_precision

# What machine receivers take from other packages: their code, and the weights that lie in them.


MEND = "install hpcm-scale[machine]"
"""What a user can do about a missing package."""


def required(receiver: str, module: str, package: str, mend: str = MEND) -> ModuleType:
    """The module, imported.

    Raises UserError, which ends with `mend`, if `package`, which has the module, is not installed or does not load.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"{receiver} needs the package {package} ({error}); {mend}") from error


def packaged_file(receiver: str, package: str, path: str) -> Path:
    """A file inside an installed package, found without importing the package: `path` is from the package's folder.

    Raises UserError if the package is not installed, or does not have the file.
    """
    module = package.replace("-", "_")
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{receiver} needs the package {package}; {MEND} with a Python that {package} supports")
    file = Path(spec.submodule_search_locations[0], path)
    if not file.is_file():
        raise UserError(f"the package {package} that is installed has no {path}; {MEND} again")
    return file


def first_sentence(error: Exception) -> str:
    """What an error of another library says, without the advice that follows."""
    return str(error).strip().partition("\n")[0].partition(". ")[0].removesuffix(".")


SMALLEST_SIDE = 32
"""Of an image that an extractor takes, in pixels."""


class TokenExtractor(nn.Module, ABC):
    """A frozen network that sees images as tokens.

    Its weights need no gradients and it is in evaluation mode always, also after `train()`. It computes in fp32, under
    autocast too, though a process may multiply fp32 numbers as TF32 (`model.layers.set_arithmetic`). Gradients reach
    the pixels. Nothing in it depends on data, so a copy on `meta` counts its FLOPs.
    """

    name: str
    """As `machine.receivers.receiver` knows it."""
    token_channels: dict[str, int]
    """The layers that `forward` gives tokens of, and the channels of each."""

    def __init__(self, name: str, network: nn.Module, token_channels: dict[str, int]) -> None:
        super().__init__()
        self.name, self.token_channels = name, token_channels
        self.network = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> TokenExtractor:
        """Stay in evaluation mode: batch statistics and dropout are not what the receiver was trained for."""
        return super().train(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in [0, 1], H and W from 32, to the tokens (B, tokens, channels) fp32 of each layer.

        Raises ValueError for another shape.
        """
        with full_precision(x):
            return self.tokens(_checked(x))

    def posterior(self, x: Tensor) -> Tensor | None:
        """Images as in `forward` to log probabilities (B, classes) fp32; None for a receiver without classes."""
        with full_precision(x):
            return self.log_probabilities(_checked(x))

    @abstractmethod
    def tokens(self, x: Tensor) -> dict[str, Tensor]:
        """`forward`, of fp32 images and outside autocast."""

    def log_probabilities(self, x: Tensor) -> Tensor | None:
        """`posterior`, of fp32 images and outside autocast."""
        return None


def check_size(size: Size, name: str, mend: str) -> None:
    """Raise UserError, which names the image and ends with `mend`, if (height, width) is too small for receivers."""
    sources.check_size(size, name, mend, smallest=SMALLEST_SIDE, who="receivers look at")


def _checked(x: Tensor) -> Tensor:
    if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[2:]) < SMALLEST_SIDE:
        raise ValueError(f"images are (B, 3, H, W) with sides from {SMALLEST_SIDE} pixels, not {tuple(x.shape)}")
    return x.float()


def as_tokens(features: Tensor) -> Tensor:
    """A feature map (B, C, h, w) as tokens (B, h·w, C), row by row."""
    return features.flatten(2).transpose(1, 2)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of (B, C, H, W) until its sides are multiples of `multiple`."""
    height, width = x.shape[2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def resized(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Resize images (B, C, H, W) to `size`, (height, width), antialiased; `mode` is that of `F.interpolate`.

    Its backward pass has no deterministic algorithm on CUDA. Where these are asked for, the same is computed as two
    matrix products, in fp64, which TF32 does not round.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return F.interpolate(x, size, mode=mode, antialias=True)
    rows, columns = (_interpolation(*sides, mode, x) for sides in zip(x.shape[2:], size, strict=True))
    return (rows @ x.double() @ columns.T).to(x.dtype)


def _interpolation(side: int, new: int, mode: str, like: Tensor) -> Tensor:
    """The matrix (new, side) fp64 by which a column of `side` pixels is multiplied to be resized."""
    impulses = torch.eye(side, dtype=torch.float64, device=like.device)
    return F.interpolate(impulses[None, None], (new, side), mode=mode, antialias=True)[0, 0]
