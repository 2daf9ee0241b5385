"""The network in front of a codec that edits images for machine receivers; the decoder knows nothing of it.

After arXiv 2407.17060, whose pre-editor sees the image and its tokens; the network itself is our own. Layers are those
of HPCM's transforms; tokens and rate reach it as a scale and a shift per channel (FiLM, arXiv 1709.07871).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcm_scale.config.schema import Checkpointing, Precision, PreEditorConfig
from hpcm_scale.machine.extractor import pad_to_multiple
from hpcm_scale.model.layers import (
    cast_once,
    down,
    full_precision,
    leaky_relu,
    partial_block,
    pointwise_layers,
    reduced_precision,
    set_ways,
    up,
)

STEM_KERNEL = 4
"""Of the first and the last convolution, as in most codecs here."""
RATIO, EXPANSION = 4, 4
"""Of the residual blocks, as in the transforms of all codecs here."""
CONDITION_WIDTH = 64
"""Numbers in which tokens and level are summed up for all scales."""


class PreEditor(nn.Module):
    """U-Net: an image to the image plus an edit, which starts as exactly zero.

    `precision` is that of its convolutions; `checkpoint` says whether the backward pass computes activations within
    residual blocks again. Images in channels-last memory format take the fast way.
    """

    def __init__(
        self,
        config: PreEditorConfig,
        token_channels: dict[str, int] | None,
        levels: int,
        *,
        precision: Precision = Precision.fp32,
        checkpoint: Checkpointing = Checkpointing.none,
    ) -> None:
        """`token_channels`: those of the receiver whose tokens it sees, None for none; `levels`: those of the codec."""
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
        set_ways(self, precision, lambda name: checkpoint != Checkpointing.none)
        self._pointwise = pointwise_layers(self)

    @property
    def multiple(self) -> int:
        """Images of other sides are padded to multiples of this many pixels, and what comes of it is cut off."""
        return 2 ** len(self.shrink)

    def forward(self, x: Tensor, tokens: dict[str, Tensor] | None = None, mix: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) fp32 in [0, 1], of any size, to edited ones of the same shape, fp32.

        They are not clamped: the codec takes any numbers, and gradients reach the editor everywhere.

        Args:
            x: images.
            tokens: what the receiver sees in them, (B, T, C) of each layer; None if the editor was built without.
            mix: (B, levels), the levels as `HPCM.mix` gives them; None at fixed rate.

        Raises:
            ValueError: tokens or levels missing, or there without having been built for.
        """
        height, width = x.shape[2:]
        whole = height % self.multiple == width % self.multiple == 0
        with reduced_precision(x, self.precision), cast_once(self._pointwise, x):
            condition = self._condition(x, tokens, mix)
            edit = self._edit(x if whole else pad_to_multiple(x, self.multiple), condition)
        return x + edit[:, :, :height, :width]

    def _condition(self, x: Tensor, tokens: dict[str, Tensor] | None, mix: Tensor | None) -> Tensor | None:
        if self.condition is not None:
            with full_precision(x):
                return self.condition(tokens or {}, mix)
        if tokens or mix is not None:
            raise ValueError("this pre-editor was built to see the image alone, without tokens and levels")
        return None

    def _edit(self, x: Tensor, condition: Tensor | None) -> Tensor:
        passed = []
        for shrink, stage in zip(self.shrink, self.seen, strict=True):
            x = stage(shrink(x), condition)
            passed.append(x)
        for grow, stage, beside in zip(self.grow, self.edited, passed[-2::-1], strict=True):
            x = stage(grow(x) + beside, condition)
        return self.to_image(x)


class Stage(nn.Module):
    """What happens at one resolution: (B, C, H, W) to the same shape."""

    def __init__(self, channels: int, blocks: int, conditioned: bool) -> None:
        super().__init__()
        self.modulate = Modulation(channels) if conditioned else None
        self.blocks = nn.Sequential(*(partial_block(channels, RATIO, EXPANSION) for _ in range(blocks)))

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        return self.blocks(x if self.modulate is None else self.modulate(x, condition))


class Modulation(nn.Module):
    """FiLM: x·(1 + scale) + shift, per image and channel; both start at zero."""

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
    """Tokens and level in a few numbers, (B, CONDITION_WIDTH) fp32.

    Of each layer the mean and the standard deviation over its tokens, whatever their unit, in which receivers differ;
    of the level a vector, between two neighbours' where the level lies between.
    """

    def __init__(self, token_channels: dict[str, int], levels: int) -> None:
        super().__init__()
        self.layers = list(token_channels)
        # In a list, since names of layers need not be names of modules.
        self.of_tokens = nn.ModuleList(nn.Linear(2 * channels, CONDITION_WIDTH) for channels in token_channels.values())
        self.of_level = nn.Linear(levels, CONDITION_WIDTH, bias=False) if levels > 1 else None

    def forward(self, tokens: dict[str, Tensor], mix: Tensor | None) -> Tensor:
        if set(tokens) != set(self.layers) or (mix is None) != (self.of_level is None):
            raise ValueError(
                f"this pre-editor sees the layers {self.layers} and {'the' if self.of_level else 'no'} level, not "
                f"{list(tokens)} and {'no' if mix is None else 'a'} level"
            )
        parts = [linear(_pooled(tokens[name])) for name, linear in zip(self.layers, self.of_tokens, strict=True)]
        if self.of_level is not None:
            parts.append(self.of_level(mix))
        return leaky_relu(torch.stack(parts).sum(dim=0))


def _pooled(tokens: Tensor) -> Tensor:
    """Tokens (B, T, C) to mean and standard deviation of each channel, (B, 2C) fp32, in units of their energy.

    None of it takes gradients.
    """
    deviation, mean = torch.std_mean(tokens.detach().float(), dim=1, correction=0)
    return F.normalize(torch.cat([mean, deviation], dim=1)) * tokens.shape[2] ** 0.5
