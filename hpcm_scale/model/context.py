"""The hierarchical progressive context model (arXiv 2507.19125, section III)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from hpcm_scale.config.schema import Fusion, HyperPlacement, ModelConfig, PriorConfig
from hpcm_scale.model.arithmetic import attend, memory_format_of
from hpcm_scale.model.coding_order import CodingOrder, Positions, Scale, misplaced
from hpcm_scale.model.layers import ChannelScale, Pointwise, checkpointed, depthwise_block, reduced
from hpcm_scale.model.transforms import start_scales
from hpcm_scale.model.variable_rate import Gains


class Place(NamedTuple):
    """A step of the coding order."""

    step: int
    """Its number over all scales."""
    level: int
    """Its scale, 0 to 2: s1, s2, s3."""
    positions: Positions
    """The positions that it codes."""


Code = Callable[[Place, Tensor, Tensor], Tensor]
"""(place, scales, means) to ŷ, all (B, M, …) on the grid of the scale; only ŷ at the place's positions is used."""

PackedCode = Callable[[int, Tensor, Tensor], Tensor]
"""(step, scales, means) to ŷ at the positions of the step; all packed (see `Positions`)."""


class WindowFusion(nn.Module):
    """Cross-attention in non-overlapping windows: queries from new parameters, keys and values from the old context.

    Both are (B, 2M, H, W), H and W multiples of the window; a 1×1 convolution of the parameters is added.
    """

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.query, self.key, self.value, self.skip = (Pointwise(channels, channels) for _ in range(4))

    def forward(self, parameters: Tensor, context: Tensor) -> Tensor:
        parameters, context = reduced(parameters), reduced(context)  # one cast for two products
        query, key, value = self.query(parameters), self.key(context), self.value(context)
        attended = attend(*(self._to_windows(x) for x in (query, key, value)))
        return self._from_windows(attended, query) + self.skip(parameters)

    def _to_windows(self, x: Tensor) -> Tensor:
        """(B, heads·d, H, W) to (B·windows, heads, window², d)."""
        batch, channels, height, width = x.shape
        w = self.window
        x = x.reshape(batch, self.heads, channels // self.heads, height // w, w, width // w, w)
        return x.permute(0, 3, 5, 1, 4, 6, 2).flatten(4, 5).flatten(0, 2)

    def _from_windows(self, x: Tensor, like: Tensor) -> Tensor:
        """The inverse of it, in shape and memory format of `like`."""
        batch, channels, height, width = like.shape
        w = self.window
        x = x.reshape(batch, height // w, width // w, self.heads, w, w, channels // self.heads)
        x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
        return x.contiguous(memory_format=memory_format_of(like))


class ContextModel(nn.Module):
    """Walks the coding order: the one traversal of training, encoding and decoding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        latent = config.latent_channels
        wide = config.context_channels or 3 * latent
        self.order = CodingOrder()
        self.aligned = config.hyper_placement == HyperPlacement.aligned
        self._without_network = (1, 0, 0)  # the first step uses the hyper parameters
        networks = [
            len(scale.steps) - bare for scale, bare in zip(self.order.scales, self._without_network, strict=True)
        ]
        adaptors = nn.ModuleList(
            nn.ModuleList(_adaptor(3 * latent, wide, blocks) for _ in range(count))
            for count, blocks in zip(networks, config.adaptor_blocks, strict=True)
        )
        self.adaptors = cast("Sequence[nn.ModuleList]", adaptors)
        self.q = nn.ModuleList(ChannelScale(wide, config.rate.levels) for _ in range(sum(networks)))
        self.gains = Gains(config.rate, latent) if config.rate.levels > 1 else None
        self.prior_s1_s2 = _Prior(wide, latent, config.prior_s1_s2)
        self.prior_s3 = _Prior(wide, latent, config.prior_s3)
        self.merge = nn.ModuleList(Pointwise(2 * latent, 2 * latent) for _ in range(2))
        self.fusion = nn.ModuleList()
        if config.fusion == Fusion.attention:
            self.fusion.extend(WindowFusion(2 * latent, config.attention_heads, window) for window in (4, 8, 8))
        self.recompute = False
        """Whether the backward pass recomputes the networks of each step."""

    def traverse(self, hyper_parameters: Tensor, code: Code, mix: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Walk through y in coding order.

        Args:
            hyper_parameters: (B, 2M, H, W) fp32, scales then means.
            code: called once per step; returns ŷ by quantizing y, or by reading a stream.
            mix: (B, levels) of a variable-rate model.

        Returns:
            ŷ (B, M, H, W) fp32, and the scales and means that each position was coded with, (B, 2M, H, W) fp32.
        """
        hyper_grids = self.order.grids(hyper_parameters, parts=2)
        context = parameters = used = hyper_grids[0]
        y_hat = _zeros_of_half(context)
        step = 0
        for level, (scale, hyper) in enumerate(zip(self.order.scales, hyper_grids, strict=True)):
            if level > 0:
                y_hat = scale.refine(y_hat, _zeros_of_half(hyper))
                used = scale.refine(used, hyper, parts=2)
                context = self.merge[level - 1](self._refine_context(scale, level, context, hyper))
            for index, positions in enumerate(scale.steps):
                if step > 0:
                    networks = partial(self._advance, level, index - self._without_network[level], step - 1, mix)
                    advance = partial(checkpointed, networks) if self.recompute else networks
                    parameters, context = advance(context, y_hat)
                coded = code(Place(step, level, positions), *parameters.chunk(2, dim=1))
                y_hat = positions.choose(coded, y_hat)
                used = positions.choose(parameters, used, parts=2)
                step += 1
        return y_hat, used

    def traverse_packed(self, hyper_parameters: Tensor, code: PackedCode, mix: Tensor | None = None) -> Tensor:
        """`traverse` with packed values, as encoder and decoder use them; returns ŷ."""

        def on_grid(place: Place, scales: Tensor, means: Tensor) -> Tensor:
            take = place.positions.take
            return place.positions.put(code(place.step, take(scales), take(means)), means)

        return self.traverse(hyper_parameters, on_grid, mix)[0]

    def _advance(
        self, level: int, index: int, number: int, mix: Tensor | None, context: Tensor, y_hat: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The parameters of a step (network `index` of its scale, `number` of all) and the context after it."""
        prior = self.prior_s3 if level == 2 else self.prior_s1_s2
        adapted = self.adaptors[level][index](torch.cat([context, y_hat], dim=1))
        parameters = prior.after(self.q[number](prior.before(adapted), mix))
        return parameters, self.fusion[level](parameters, context) if self.fusion else parameters

    def _refine_context(self, scale: Scale, level: int, context: Tensor, hyper: Tensor) -> Tensor:
        """The context of the coarser scale on its positions, hyper parameters on the others."""
        if not self.aligned and level == 1:
            hyper = torch.cat([misplaced(half) for half in hyper.chunk(2, dim=1)], dim=1)
        return scale.refine(context.to(hyper.dtype), hyper, parts=2)


def _zeros_of_half(parameters: Tensor) -> Tensor:
    """Zeros (B, M, …) for ŷ in the memory format of parameters (B, 2M, …)."""
    half = parameters[:, : parameters.shape[1] // 2]
    return torch.zeros_like(half, memory_format=memory_format_of(parameters))


def _adaptor(channels: int, outputs: int, blocks: int) -> nn.Module:
    if blocks == 0:
        return Pointwise(channels, outputs)
    return nn.Sequential(*(depthwise_block(channels) for _ in range(blocks)))


class _Prior(nn.Module):
    """Prior network: adapted context and ŷ (`wide` channels) to parameters (2M, fp32: scales, then means).

    In two halves, `before` and `after` the channel scale q of the step.
    """

    def __init__(self, wide: int, latent_channels: int, depth: PriorConfig) -> None:
        super().__init__()
        narrow = 2 * latent_channels
        self.before = nn.Sequential(*(depthwise_block(wide) for _ in range(depth.before)))
        self.after = nn.Sequential(
            *(depthwise_block(wide) for _ in range(depth.after)),
            start_scales(Pointwise(wide, narrow, fp32=True)),
            *(depthwise_block(narrow) for _ in range(depth.refine)),
        )
