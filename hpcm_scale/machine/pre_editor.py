"""The pre-editor: a network that edits images for a receiver before encoding; the decoder does not need it.

After arXiv 2407.17060, whose pre-editor has the image and its tokens as inputs; the architecture is our own, a U-Net of
the layers of HPCM's transforms. Tokens and level condition it by a scale and a shift per channel (FiLM, arXiv
1709.07871).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcm_scale.config.schema import Checkpointing, Precision, PreEditorConfig
from hpcm_scale.evaluation.estimate import pad
from hpcm_scale.model.layers import (
    cast_once,
    configure_layers,
    down,
    full_precision,
    leaky_relu,
    partial_block,
    reduced_precision,
    up,
)

STEM_KERNEL = 4
"""Kernel of the first and the last convolution, as in most models here."""
RATIO, EXPANSION = 4, 4
"""Of the residual blocks, as in the transforms of all models."""
CONDITION_WIDTH = 64
"""Width of the conditioning vector."""


class PreEditor(nn.Module):
    """U-Net that adds an edit to an image; the edit is initialised to exactly zero.

    `precision`: of its convolutions. `activation_checkpointing`: recomputes the residual blocks in the backward pass.
    Channels-last images are faster.
    """

    def __init__(
        self,
        config: PreEditorConfig,
        token_channels: dict[str, int] | None,
        levels: int,
        *,
        precision: Precision = Precision.fp32,
        activation_checkpointing: Checkpointing = Checkpointing.none,
    ) -> None:
        """`token_channels`: of the receiver whose tokens are an input, or None; `levels`: of the codec."""
        super().__init__()
        self.precision = precision
        widths = config.channels
        conditioned = bool(token_channels) or levels > 1
        self.condition = Condition(token_channels or {}, levels) if conditioned else None
        self.shrink, self.seen = nn.ModuleList(), nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip([3, *widths], widths, strict=False)):
            self.shrink.append(down(inputs, outputs, kernel=2 if i else STEM_KERNEL))
            self.seen.append(Stage(outputs, config.blocks, conditioned))
        self.grow, self.edited = nn.ModuleList(), nn.ModuleList()
        for inputs, outputs in zip(widths[:0:-1], widths[-2::-1], strict=True):
            self.grow.append(up(inputs, outputs))
            self.edited.append(Stage(outputs, config.blocks, conditioned))
        self.to_image = up(widths[0], 3, kernel=STEM_KERNEL, fp32=True)
        nn.init.zeros_(self.to_image.weight)
        recompute = activation_checkpointing != Checkpointing.none
        self._pointwise = configure_layers(self, precision, lambda _: recompute)

    @property
    def multiple(self) -> int:
        """Images are padded to multiples of this many pixels, and the result is cropped."""
        return 2 ** len(self.shrink)

    def forward(self, x: Tensor, tokens: dict[str, Tensor] | None = None, mix: Tensor | None = None) -> Tensor:
        """Edited images (B, 3, H, W) fp32 of images in [0, 1] of any size; not clamped, so that gradients flow.

        Args:
            x: images.
            tokens: the receiver's tokens of them, (B, T, C) by layer; None without `token_channels`.
            mix: the levels, (B, levels), as `HPCM.mix` returns them; None at fixed rate.

        Raises:
            ValueError: tokens or levels are missing, or not supported.
        """
        height, width = x.shape[2:]
        aligned = height % self.multiple == width % self.multiple == 0
        with reduced_precision(x, self.precision), cast_once(self._pointwise, x):
            condition = self._condition(x, tokens, mix)
            edit = self._edit(x if aligned else pad(x, self.multiple), condition)
        return x + edit[:, :, :height, :width]

    def _condition(self, x: Tensor, tokens: dict[str, Tensor] | None, mix: Tensor | None) -> Tensor | None:
        if self.condition is not None:
            with full_precision(x):
                return self.condition(tokens or {}, mix)
        if tokens or mix is not None:
            raise ValueError("this pre-editor has only the image as input, without tokens and levels")
        return None

    def _edit(self, x: Tensor, condition: Tensor | None) -> Tensor:
        passed = []
        for shrink, stage in zip(self.shrink, self.seen, strict=True):
            x = stage(shrink(x), condition)
            passed.append(x)
        for grow, stage, skip in zip(self.grow, self.edited, passed[-2::-1], strict=True):
            x = stage(grow(x) + skip, condition)
        return self.to_image(x)


class Stage(nn.Module):
    """The residual blocks of one resolution: (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, blocks: int, conditioned: bool) -> None:
        super().__init__()
        self.modulate = Modulation(channels) if conditioned else None
        self.blocks = nn.Sequential(*(partial_block(channels, RATIO, EXPANSION) for _ in range(blocks)))

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        return self.blocks(x if self.modulate is None else self.modulate(x, condition))


class Modulation(nn.Module):
    """FiLM: x·(1 + scale) + shift per image and channel; both are initialised to zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(CONDITION_WIDTH, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        with full_precision(x):
            scale, shift = self.linear(condition).to(x.dtype)[:, :, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class Condition(nn.Module):
    """Conditioning vector of tokens and level, (B, CONDITION_WIDTH) fp32.

    Inputs are the normalised mean and standard deviation over the tokens of each layer, and an embedding of the level,
    interpolated between neighbouring levels.
    """

    def __init__(self, token_channels: dict[str, int], levels: int) -> None:
        super().__init__()
        self.layers = list(token_channels)
        # A list, since names of layers may not be valid names of modules.
        self.of_tokens = nn.ModuleList(nn.Linear(2 * channels, CONDITION_WIDTH) for channels in token_channels.values())
        self.of_level = nn.Linear(levels, CONDITION_WIDTH, bias=False) if levels > 1 else None

    def forward(self, tokens: dict[str, Tensor], mix: Tensor | None) -> Tensor:
        if set(tokens) != set(self.layers) or (mix is None) != (self.of_level is None):
            raise ValueError(
                f"this pre-editor takes the layers {self.layers} and {'the' if self.of_level else 'no'} level, not "
                f"{list(tokens)} and {'no' if mix is None else 'a'} level"
            )
        parts = [linear(_pooled(tokens[name])) for name, linear in zip(self.layers, self.of_tokens, strict=True)]
        if self.of_level is not None:
            parts.append(self.of_level(mix))
        return leaky_relu(torch.stack(parts).sum(dim=0))


def _pooled(tokens: Tensor) -> Tensor:
    """Mean and standard deviation of each channel of tokens (B, T, C), normalised: (B, 2C) fp32, without gradients."""
    deviation, mean = torch.std_mean(tokens.detach().float(), dim=1, correction=0)
    return F.normalize(torch.cat([mean, deviation], dim=1)) * tokens.shape[2] ** 0.5
